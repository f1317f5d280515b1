"""Trying every claim on a backend, and reporting what came of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from longnet_kit import attention, terminal
from longnet_kit.attention.backend import AttentionBackend
from longnet_kit.errors import UserError
from longnet_kit.testing import claims
from longnet_kit.testing.subject import Broken, Subject, Unchecked, telling_lengths, widest


class Check(NamedTuple):
    """One claim about a backend and what came of it."""

    claim: str
    passed: bool | None
    """None when it could not be checked."""
    message: str = ""

    def __str__(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "--  "}[self.passed]
        return f"{mark} {self.claim}" + (f": {self.message}" if self.message else "")


class ConformanceError(AssertionError):
    """A backend that breaks a claim; the message lists every broken one."""


def check_backend(
    backend: AttentionBackend, *, device: str | torch.device = "cpu", seq_lens: Sequence[int] | None = None
) -> list[Check]:
    """Hold a backend to every claim.

    Args:
        backend: an instance, built with lengths small enough that its pattern shows at `seq_lens`.
        device: where to run it.
        seq_lens: sequence lengths to try; None takes short ones, and longer ones if the pattern only shows there.

    Returns:
        The checks; those with `passed` None could not be made.

    Raises:
        ConformanceError: a claim does not hold. The message lists every one. Or none could be checked.
    """
    checks = run_checks(backend, device=device, seq_lens=seq_lens)
    if all(check.passed is None for check in checks):
        reasons = "\n".join(str(check) for check in checks)
        raise ConformanceError(f"{type(backend).__name__}: no claim could be checked:\n{reasons}")
    broken = [str(check) for check in checks if check.passed is False]
    if broken:
        raise ConformanceError(f"{type(backend).__name__} breaks {len(broken)} of {len(checks)}:\n" + "\n".join(broken))
    return checks


def run_checks(
    backend: AttentionBackend, *, device: str | torch.device = "cpu", seq_lens: Sequence[int] | None = None
) -> list[Check]:
    """Try every claim on a backend and report; arguments as of `check_backend`. The backend is left in eval mode."""
    backend = backend.eval().to(device)
    lengths = tuple(seq_lens) if seq_lens is not None else telling_lengths(backend.pattern)
    subject = Subject(backend, torch.device(device), lengths, *widest(backend, torch.device(device)))
    with torch.random.fork_rng(devices=[subject.device] if subject.device.type == "cuda" else []):
        return [_run(claim, subject) for claim in claims.ALL]


def main_check(name: str, options: Mapping[str, Any]) -> int:
    """Check the backend registered as `name`, built with `options`; print the report.

    Returns:
        0 when every claim holds that could be checked, at least one; else 1.

    Raises:
        UserError: there is no such backend, or it does not take these options.
    """
    if "backend" in options:
        raise UserError(
            f"backend is no option: the backend to check is {name!r}; leave out backend={options['backend']}"
        )
    try:
        backend = attention.build({"backend": name, **options})
    except UserError as error:
        raise UserError(f"check-backend {name}: {error}") from error
    checks = run_checks(backend)
    for check in checks:
        terminal.say(str(check))
    failed = sum(check.passed is False for check in checks)
    unchecked = sum(check.passed is None for check in checks)
    terminal.say(f"{name}: {len(checks) - failed - unchecked} claims hold, {failed} broken, {unchecked} not checked")
    return 1 if failed or unchecked == len(checks) else 0


def _run(claim: Callable[[Subject], str | None], subject: Subject) -> Check:
    words = (claim.__doc__ or "").strip()
    torch.manual_seed(0)
    try:
        remark = claim(subject) or ""
    except Unchecked as reason:
        return Check(words, None, str(reason))
    except Broken as broken:
        return Check(words, False, str(broken))
    except Exception as error:  # a plug-in may raise anything
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Check(words, False, f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})")
    return Check(words, True, remark)
