"""The conformance check lets the kit's backends through and refuses broken ones."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longnet_kit import attention, cli
from longnet_kit.attention import flash, patterns
from longnet_kit.attention.backend import AttentionBackend, Support
from longnet_kit.attention.dilated import DilatedAttention
from longnet_kit.testing import ConformanceError, check_backend, main_check, run_checks

BRANCHES = {"segment_lengths": [4, 16], "dilation_rates": [1, 2]}


@pytest.mark.parametrize(
    "config",
    [
        {"backend": "naive"},
        {"backend": "naive", "pattern": {"kind": "block_sparse", "block_size": 8}},
        {"backend": "naive", "pattern": {"kind": "dilated", **BRANCHES}},
        {"backend": "sdpa"},
        {"backend": "dilated", **BRANCHES},
        {"backend": "dilated", **BRANCHES, "mixing": "equal"},
        {"backend": "dilated", **BRANCHES, "mixing": "learned"},
        {"backend": "naive", "pattern": {"kind": "dilated", **BRANCHES, "overlap": "set"}},
        {"backend": "xformers", "block_size": 16, "local_blocks": 2},
    ],
    ids=str,
)
def test_the_kits_backends_conform(config: dict) -> None:
    checks = check_backend(attention.build(config))
    assert all(check.passed for check in checks)


def test_a_set_conforms_but_for_the_cache_that_it_lacks() -> None:
    checks = check_backend(attention.build({"backend": "dilated", **BRANCHES, "overlap": "set"}))
    (lacking,) = (check for check in checks if not check.passed)
    assert lacking.passed is None and "overlap: set has no cache" in lacking.message


def test_weights_of_the_branches_own_are_not_taken_for_one_softmax() -> None:
    """The report says what was compared; without its weights the backend fails."""

    class Silent(DilatedAttention):
        @property
        def branch_logits(self) -> None:
            return None

    (told,) = (check for check in check_backend(DilatedAttention(**BRANCHES, mixing="equal")) if check.message)
    assert "Values and gradients" in told.claim and "one for each branch" in told.message
    with pytest.raises(ConformanceError, match="the output is off"):
        check_backend(Silent(**BRANCHES, mixing="equal"))


class Softmax(AttentionBackend):
    """Correct dense attention, to be broken one rule at a time; it has no pattern."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool = True, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        seq_len = q.shape[1]
        seen = torch.ones(seq_len, seq_len, dtype=torch.bool, device=q.device)
        seen = self.visible(seen.tril() if causal else seen)[None, None]
        real = q.new_ones(q.shape[:2], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        q, k, v = (self.clean(x, real) for x in (q, k, v))
        seen = self.unpadded(seen, real)
        scores = torch.einsum("bphd,bkhd->bhpk", q, k).float() if q.dtype != torch.float64 else (
            torch.einsum("bphd,bkhd->bhpk", q, k)
        )  # fmt: skip
        scores = self.scaled(scores, q.shape[-1])
        blind = ~seen.any(-1, keepdim=True)
        weights = self.weights(scores.masked_fill(~seen & ~blind, -math.inf)).masked_fill(blind, 0)
        out = torch.einsum("bhpk,bkhd->bphd", weights.to(v.dtype), v)
        return self.finish(out, real)

    def visible(self, seen: Tensor) -> Tensor:
        return seen

    def clean(self, x: Tensor, real: Tensor) -> Tensor:
        return x.masked_fill(~real[:, :, None, None], 0)

    def unpadded(self, seen: Tensor, real: Tensor) -> Tensor:
        return seen & real[:, None, None, :]

    def scaled(self, scores: Tensor, head_dim: int) -> Tensor:
        return scores / head_dim**0.5

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def finish(self, out: Tensor, real: Tensor) -> Tensor:
        return out.masked_fill(~real[:, :, None, None], 0)


class WithPattern(Softmax):
    @property
    def pattern(self) -> patterns.Pattern:
        return patterns.Dense()


class WithCache(WithPattern):
    def new_cache(self, batch_size: int, heads: int, head_dim: int, **factory: Any) -> attention.KeyValueCache:
        return attention.KeyValueCache(batch_size, heads, head_dim, **factory)

    def forward_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: attention.KeyValueCache) -> Tensor:
        k, v = cache.append(k, v)
        missing = k.shape[1] - q.shape[1]
        return self.forward(torch.cat((k[:, :missing], q), 1), k, v)[:, missing:]


class ForgetsThePast(WithCache):
    def forward_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: attention.KeyValueCache) -> Tensor:
        return self.forward(q, k, v)


class SeesAllOfAChunk(WithCache):
    def forward_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: attention.KeyValueCache) -> Tensor:
        k, v = cache.append(k, v)
        return attention.build({"backend": "sdpa"})(*(x[:, -q.shape[1] :] for x in (q, k, v)), causal=False)


class LeaksTheFuture(Softmax):
    def visible(self, seen: Tensor) -> Tensor:
        return seen | seen.roll(1, 0)


class CountsPadding(Softmax):
    def unpadded(self, seen: Tensor, real: Tensor) -> Tensor:
        return seen


class KeepsNaN(Softmax):
    def clean(self, x: Tensor, real: Tensor) -> Tensor:
        return x


class PaddedQueriesAnswer(Softmax):
    def finish(self, out: Tensor, real: Tensor) -> Tensor:
        return out


class DropsTheGradientOfWeights(Softmax):
    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1).detach()


class Unnormalised(Softmax):
    def weights(self, scores: Tensor) -> Tensor:
        return scores.exp()


class Unscaled(WithPattern):
    def scaled(self, scores: Tensor, head_dim: int) -> Tensor:
        return scores


class ScaledForOneWidth(WithPattern):
    def scaled(self, scores: Tensor, head_dim: int) -> Tensor:
        return scores * 8**-0.5


class NoMaximum(Softmax):
    def weights(self, scores: Tensor) -> Tensor:
        weights = scores.exp()
        return weights / weights.sum(-1, keepdim=True)


class GarbageInFloat32(WithPattern):
    """Declines float64, in which most claims are checked."""

    def supports(self, *, dtype: torch.dtype, **_: object) -> Support:
        return Support(dtype != torch.float64, "no float64")

    def finish(self, out: Tensor, real: Tensor) -> Tensor:
        return super().finish(torch.ones_like(out) + out - out.detach(), real)


class DropsOut(Softmax):
    def weights(self, scores: Tensor) -> Tensor:
        return torch.nn.functional.dropout(scores.softmax(-1), 0.1)


class MixesTheBatch(Softmax):
    def finish(self, out: Tensor, real: Tensor) -> Tensor:
        return super().finish(out + 1e-3 * out.mean(0, keepdim=True), real)


class WrongDtype(Softmax):
    def finish(self, out: Tensor, real: Tensor) -> Tensor:
        return super().finish(out.float(), real)


class HeadsByCount(Softmax):
    """Depends on the head's index without saying so."""

    def scaled(self, scores: Tensor, head_dim: int) -> Tensor:
        return super().scaled(scores, head_dim) * torch.arange(1, scores.shape[1] + 1)[:, None, None]


class StaysInItsShard(Softmax):
    """Attends to this rank's tokens alone, as implementations do that leave ranks out."""

    def forward_sharded(self, q: Tensor, k: Tensor, v: Tensor, *rest: object, **heads: int) -> Tensor:
        return self.forward(q, k, v)


class Raises(Softmax):
    def scaled(self, scores: Tensor, head_dim: int) -> Tensor:
        raise RuntimeError("out of cheese")


def test_a_correct_plugin_passes_and_says_what_was_not_checked() -> None:
    unchecked = [check for check in check_backend(Softmax()) if check.passed is None]
    assert all(message in check.message for message, check in zip(("no pattern", "no cache"), unchecked, strict=True))
    assert all(check.passed for check in check_backend(WithCache()))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (LeaksTheFuture, "before position"),
        (CountsPadding, "under another padding|shorter sequence"),
        (KeepsNaN, "not finite"),
        (PaddedQueriesAnswer, "the output of padding"),
        (DropsTheGradientOfWeights, "slope along q"),
        (Unnormalised, "sum of the weights"),
        (Unscaled, "the output is off"),
        (ScaledForOneWidth, "heads 12 wide: the output is off"),
        (NoMaximum, "times 30: the output or a gradient is not finite"),
        (GarbageInFloat32, "the output is off"),
        (DropsOut, "two runs differ"),
        (MixesTheBatch, "row 0 alone"),
        (WrongDtype, "float32"),
        (HeadsByCount, "heads 2 to 4"),
        (StaysInItsShard, "on 2 ranks: the output is off"),
        (ForgetsThePast, "chunks of \\[1\\]: the output is off"),
        (SeesAllOfAChunk, "chunks of .*: the output is off"),
        (Raises, "out of cheese"),
    ],
)
def test_a_broken_backend_is_refused(broken: type[Softmax], words: str) -> None:
    with pytest.raises(ConformanceError, match=words):
        check_backend(broken())


def test_mixing_weights_without_gradient_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchscale's backward: each branch's own out and lse, with the mixing weights held constant."""
    from longnet_kit.attention import dilated

    class Detached(AttentionBackend):
        def __init__(self) -> None:
            super().__init__()
            self.branches = [
                attention.build({"backend": "dilated", "segment_lengths": [w], "dilation_rates": [1]}) for w in (4, 16)
            ]

        @property
        def pattern(self) -> patterns.Pattern:
            return patterns.Dilated([4, 16], [1, 1])

        def forward(
            self, q: Tensor, k: Tensor, v: Tensor, causal: bool = True, key_padding_mask: Tensor | None = None
        ) -> Tensor:
            outs = torch.stack([branch(q, k, v, causal, key_padding_mask) for branch in self.branches])
            if key_padding_mask is not None:
                q, k, v = dilated.padding.hide(q, k, v, key_padding_mask)
            scale = outs.shape[-1] ** -0.5
            lses = [dilated.dilated(q, k, v, [w], [1], "interleaved", 0, q.shape[2], causal, scale)[1] for w in (4, 16)]
            return (outs * torch.stack(lses).softmax(0).detach().unsqueeze(-1).to(outs.dtype)).sum(0)

    checks = {check.claim: check for check in run_checks(Detached())}
    broken = [check for check in checks.values() if check.passed is False]
    assert any("gradient of q" in check.message or "slope along q" in check.message for check in broken)
    assert not any("the output is off" in check.message for check in broken)  # its values are right


def test_a_dilated_backward_by_branch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each branch's backward under its own softmax instead of the merged one."""
    own = flash.backward

    def by_branch(grad_out, q, k, v, out, lse, causal, scale):  # type: ignore[no-untyped-def]
        out, lse = flash.forward(q, k, v, causal, scale)
        return own(grad_out, q, k, v, out, lse, causal, scale)

    monkeypatch.setattr(flash, "backward", by_branch)
    with pytest.raises(ConformanceError, match="gradient"):
        check_backend(attention.build({"backend": "dilated", **BRANCHES}))


def test_a_backend_that_declines_is_reported_as_unchecked() -> None:
    class FloatOnly(Softmax):
        def supports(self, *, dtype: torch.dtype, **_: object) -> Support:
            return Support(dtype == torch.float32, "runs in float32 only")

    checks = check_backend(FloatOnly())
    assert any(check.passed is None and "float32 only" in check.message for check in checks)
    assert sum(check.passed is True for check in checks) > 10, "the rest is checked in float32"
    with pytest.raises(ValueError, match="float32 only"):
        FloatOnly()(*(torch.zeros(1, 2, 1, 4, dtype=torch.float64) for _ in range(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_correct_backend_of_one_dtype_conforms(dtype: torch.dtype) -> None:
    class Narrow(WithPattern):
        def supports(self, *, dtype: torch.dtype, head_dim: int, **_: object) -> Support:
            return Support(dtype == only and head_dim % 16 == 0, f"{only} only")

    only = dtype
    assert sum(check.passed is True for check in check_backend(Narrow())) > 10


def test_a_backend_of_which_nothing_can_be_checked_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing(Softmax):
        def supports(self, **_: object) -> Support:
            return Support(False, "closed today")

    with pytest.raises(ConformanceError, match="no claim could be checked"):
        check_backend(Nothing())
    monkeypatch.setitem(attention.registry._classes, "nothing", Nothing)
    assert main_check("nothing", {}) == 1


def test_the_report_is_printed_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_check("dilated", dict(BRANCHES)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].endswith("0 broken, 0 not checked")
    assert all(line.startswith("ok") for line in printed[:-1])
    with pytest.raises(ValueError, match="did you mean 'dilated'"):
        main_check("dilate", {})


PICKY = """
from longnet_kit import attention

@attention.register("picky")
class Picky(attention.AttentionBackend):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        if size % 2:
            raise ValueError(f"size is {size}, expected an even number")
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["imports=[picky]"], "check-backend picky: size is 3, expected an even number"),
        (["imports=picky"], "imports (on the command line): got 'picky' (text), expected a list, each text"),
        (["imports=[picky]", "backend=naive", "size=2"], "leave out backend=naive"),
    ],
)
def test_wrong_options_are_the_users_error(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("picky.py").write_text(PICKY)
    # The module of an earlier case, and its name, are forgotten.
    monkeypatch.delitem(sys.modules, "picky", raising=False)
    monkeypatch.setattr(attention.registry, "_classes", dict(attention.registry._classes))
    assert cli.main(["check-backend", "picky", *options]) == 2
    told = capsys.readouterr().err
    assert words in told and len(told.splitlines()) == 1
    sys.modules.pop("picky", None)
