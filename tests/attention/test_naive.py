"""The reference holds the score matrix: how much that is, and refusing what does not fit."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longnet_kit import attention, cli, host_memory
from longnet_kit.plan.ledger import without_data

PATTERN = {"kind": "dilated", "segment_lengths": [64, 256], "dilation_rates": [1, 4]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pattern", [None, PATTERN])
def test_the_estimate_is_what_the_scores_take(dtype: torch.dtype, pattern: dict | None) -> None:
    backend = attention.build({"backend": "naive"} | ({"pattern": pattern} if pattern else {}))
    with without_data() as ledger, torch.no_grad():
        ledger.phase = "inputs"
        q, k, v = (torch.empty(3, 512, 4, 4, dtype=dtype) for _ in range(3))
        ledger.label("inputs")
        ledger.phase = "forward"
        backend(q, k, v)
        needed = ledger.peaks()["forward"]["temporary"]
    assert backend.memory(3, 512, 4, dtype) == pytest.approx(needed, rel=0.1)


def test_what_does_not_fit_is_refused_with_what_it_takes_and_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = attention.build({"backend": "naive"})
    q = torch.randn(1, 300, 2, 8)
    needed = backend.memory(1, 300, 2, torch.float32)
    monkeypatch.setattr(host_memory, "free", lambda: float(needed))
    assert backend(q, q, q).shape == q.shape
    monkeypatch.setattr(host_memory, "free", lambda: needed - 1.0)
    with pytest.raises(
        ValueError, match="unable to allocate 3 MiB, the scores .* for 1 x 300 tokens.* dilated"
    ) as told:
        backend(q, q, q)
    longest = re.search(r"at most ([\d,]+) tokens", str(told.value))
    assert longest and int(longest[1]) == 299


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_refusal_is_of_the_memory_that_lacks(monkeypatch: pytest.MonkeyPatch, error: type) -> None:
    """A GPU's, of which nothing but its answers is needed here, or the machine's."""
    on_gpu = error is torch.OutOfMemoryError
    with FakeTensorMode():
        q = torch.empty(1, 4000, 8, 8, device="cuda:0" if on_gpu else "cpu")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 2**30))
    monkeypatch.setattr(host_memory, "free", lambda: 1200.0)
    backend = attention.build({"backend": "naive"})
    with pytest.raises(error, match="4,000 tokens and 8 heads: 0 MiB") as told:
        backend._check_memory(q, 8)
    assert ("GPU 0 has a total capacity of 1.00 GiB" in str(told.value)) == on_gpu
    assert isinstance(told.value, ValueError)


def test_a_run_that_cannot_fit_ends_with_the_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    monkeypatch.chdir(str(tmp_path))
    overrides = ["model.attention.backend=naive", "data.seq_len=200000", "data.batch_size=1", "data.eval_contexts=[]"]
    assert cli.main(["fit", "quickstart", "model.layers=1", *overrides, "trainer.max_steps=1"]) == 2
    told = capsys.readouterr().err
    needed = attention.build({"backend": "naive"}).memory(1, 200_000, 4, torch.float32)
    device = "GPU 0" if torch.cuda.is_available() else "the CPU"
    assert f"out of memory in step 1 of 1: {needed / 1e12:.4g} TB more could not be had on {device}" in told
    assert "what needs less:" in told and "Traceback" not in told


def test_free_memory_is_what_the_tightest_limit_leaves(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 3000 kB\nMemAvailable:    2000 kB\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_GROUPS", tmp_path)
    assert host_memory.free() == 2000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.free() == 2000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert host_memory.free() == 600_000
    assert host_memory.total() == 1_000_000 and host_memory.total(4) == 250_000
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 300000\n")
    assert host_memory.free() == 900_000, "cache gives way"
    (tmp_path / "memory.current").write_text("1400000\n")
    assert host_memory.free() == 0
    for file in tmp_path.glob("memory.*"):
        file.unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("800000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("500000\n")
    (tmp_path / "memory" / "memory.stat").write_text("total_inactive_file 200000\n")
    assert host_memory.free() == 500_000 and host_memory.total() == 800_000


def test_free_memory_is_a_part_of_the_whole() -> None:
    assert 0 < host_memory.free() <= host_memory.total()
