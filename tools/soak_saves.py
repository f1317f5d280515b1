"""Interrupt saves with SIGKILL, between any two calls into the system or half-way through a write, and look each time
whether `latest.ckpt` can be loaded and is the checkpoint before or the new one.

    .venv/bin/python tools/soak_saves.py --saves 100

Each save is a process of its own, forked from one that has imported everything. The temporary directory is put on
another filesystem than the checkpoints, /dev/shm, where it has one.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from longnet_kit import callbacks, checkpoint_io, runs, signals

KEEP = 2
FIRST = KEEP + 1
"""Saves before the first one that is interrupted: the last of them removes a checkpoint, as all later ones do."""
SYSTEM = {"open", "write", "flush", "fsync", "replace", "unlink", "symlink", "close", "mkdir"}
"""Calls into the system: half of the kills come before one of them, each kind equally often."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--saves", type=int, default=100, help="how many are interrupted")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        is_apart = os.path.isdir("/dev/shm") and os.stat("/dev/shm").st_dev != os.stat(folder).st_dev
        if is_apart:
            os.environ["TMPDIR"] = tempfile.tempdir = "/dev/shm"
        print(f"checkpoints in {folder}, the temporary directory on {'another' if is_apart else 'the same'} filesystem")
        return soak(Path(folder), arguments.saves, random.Random(arguments.seed))


def soak(folder: Path, saves: int, moments: random.Random) -> int:
    """Save step after step, each interrupted and then done; returns how often `latest.ckpt` was wrong."""
    for step in range(1, 1 + FIRST):
        calls = calls_in(lambda step=step: save(folder, step))
    places = {name: [i for i, other in enumerate(calls) if other == name] for name in sorted(SYSTEM & {*calls})}
    wrong, after = 0, {"before": 0, "new": 0}
    for step in range(1 + FIRST, 1 + FIRST + saves):
        at = moments.randrange(len(calls))
        if moments.random() < 0.5:
            at = moments.choice(places[moments.choice(list(places))])
        share = moments.random()
        code = in_a_process(lambda at=at, step=step, share=share: die_at(at, share, lambda: save(folder, step)))
        problem = look(folder, step, after)
        if code != -signal.SIGKILL:
            problem = f"the process was not killed, but ended with {code}"
        if problem:
            wrong += 1
            print(f"step {step}, killed at call {at} of {len(calls)}, {calls[at]}: {problem}")
        checkpoint_io.remove_staged(folder)  # as a run that goes on does
        assert in_a_process(lambda step=step: save(folder, step)) == 0
        left = {path.name for path in folder.iterdir()}
        kept = {f"step_{s:08d}.ckpt" for s in range(step - KEEP + 1, step + 1)}
        assert left == kept | {f"{x}{checkpoint_io.CHECKSUM}" for x in kept} | {runs.LATEST}, left
    print(f"{saves - wrong} of {saves} interrupted saves left latest.ckpt loadable: the one before {after['before']} "
          f"times, the new one {after['new']} times ({len(calls)} calls in a save)")  # fmt: skip
    return wrong


def save(folder: Path, step: int) -> None:
    """Save a step as a run does."""
    io = checkpoint_io.StagedCheckpointIO()
    content = {"global_step": step, "state_dict": {"x": torch.full((200_000,), float(step))}}
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(checkpoint_io=io, broadcast=lambda x: x),
        global_step=step,
        is_global_zero=True,
        save_checkpoint=lambda path: io.save_checkpoint(content, path),
    )
    saving = callbacks.Saving(
        every_n_steps=1, keep=KEEP, keep_best=True, generators=callbacks.Generators(), listener=signals.Listener()
    )
    saving.begin(folder, {}, {})
    saving._save(trainer)
    assert not io.problem, io.problem


def look(folder: Path, step: int, after: dict[str, int]) -> str:
    """What is wrong with `latest.ckpt` after a save of `step` was interrupted."""
    latest = folder / runs.LATEST
    if damage := checkpoint_io.damage(latest):
        return f"{latest} {damage}"
    saved = torch.load(latest, weights_only=True)
    found = saved["global_step"]
    if found not in (step - 1, step) or not torch.equal(saved["state_dict"]["x"], torch.full((200_000,), float(found))):
        return f"{latest} is of step {found}"
    after["new" if found == step else "before"] += 1
    return ""


def calls_in(act: Callable[[], None]) -> list[str]:
    """The names of the calls into C code that something makes."""
    calls: list[str] = []

    def look(frame: Any, event: str, what: Any) -> None:
        if event == "c_call":
            calls.append(getattr(what, "__name__", ""))

    sys.setprofile(look)
    act()
    sys.setprofile(None)
    return calls


def die_at(number: int, share: float, act: Callable[[], None]) -> None:
    """Do something, and be killed before its n-th call into C code; a write is begun first."""
    calls = 0

    def look(frame: Any, event: str, what: Any) -> None:
        nonlocal calls
        if event != "c_call":
            return
        calls += 1
        if calls > number:
            sys.setprofile(None)
            content = frame.f_locals.get("content")
            if getattr(what, "__name__", "") == "write" and isinstance(content, (bytes, memoryview)):
                what(content[: int(share * len(content))])
                frame.f_locals["self"]._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(look)
    act()
    sys.setprofile(None)


def in_a_process(act: Callable[[], None]) -> int:
    """Do something in a forked process; its exit code, negative where a signal has ended it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    sys.exit(min(1, main()))
