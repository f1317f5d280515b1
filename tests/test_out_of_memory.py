"""Running out of memory is told from other errors, and the advice holds what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longnet_kit import out_of_memory, placement, plan, recipe
from longnet_kit.plan import estimate, machines
from longnet_kit.recipe import Recipe
from longnet_kit.report import table

ON_CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.11 GiB of which 1.32 GiB is "
    "free. Including non-PyTorch memory, this process has 77.78 GiB memory in use. Of the allocated memory 76 GiB is "
    "allocated by PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated."
)
ON_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "8000000000 bytes. Error code 12 (Cannot allocate memory)"
)
GPU = machines.Machine("GPU 1", 79.11 * 2**30, {}, None, None)


def load(*overrides: str, name: str = "quickstart") -> Recipe:
    """A recipe with one layer, which is quickly planned."""
    return recipe.load(name, ["model.layers=1", *overrides])


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has."""
    monkeypatch.setattr(placement, "on_accelerator", lambda r: False)


@pytest.fixture
def no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(plan, "of", fail)


def ways(told: str) -> dict[str, str]:
    """What is advised, and what is said of it."""
    rows = told.partition("what needs less:\n")[2].splitlines()
    return {items.strip(): words for items, words in (re.split(r"  +", row.strip(), maxsplit=1) for row in rows)}


@pytest.mark.parametrize(
    "error",
    [
        ON_CUDA,
        ON_CPU,
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 137438953472 bytes."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("std::bad_alloc"),
        MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64"),
        MemoryError(),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:30]}",
)
def test_memory_that_ran_out(error: Exception) -> None:
    assert out_of_memory.is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("the size of tensor a must match"),
        ValueError("DefaultCPUAllocator: can't allocate memory"),
        KeyboardInterrupt(),
        OSError(28, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_others(error: BaseException) -> None:
    assert not out_of_memory.is_out_of_memory(error)


def test_torchs_own_error_of_the_cpu_is_one() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory.is_out_of_memory(caught.value)
    assert "1.153e+06 TB more could not be had on the CPU" in out_of_memory.advice(load(), caught.value, 1)


def test_the_message_has_the_step_what_was_asked_for_and_the_plans_table() -> None:
    told = out_of_memory.advice(load(), ON_CUDA, 3).splitlines()
    assert told[0] == "out of memory in step 3 of 250: 2.147 GB more could not be had on GPU 1"
    assert told[1] == "what the recipe needs on each device, by `longnet plan`, when most is allocated:"
    planned = plan.of(load(), GPU)
    shown = {name: size for name, size in planned.memory.items() if size >= 0.001 * planned.peak}
    assert {"parameters", "optimizer state", "activations", "temporary"} <= shown.keys()
    rows = dict(re.split("  +", line.strip(), maxsplit=1) for line in told[2 : 3 + len(shown)])
    assert rows == {name: table.size(size) for name, size in shown.items()} | {
        "in all": f"{table.size(planned.peak)}  of 84.94 GB on GPU 1"
    }


def test_a_validation_after_the_last_step_is_no_step(no_plan: None) -> None:
    for step, words in ((1, "in step 1 of 250: "), (250, "in step 250 of 250: "), (251, "after the last step: ")):
        assert out_of_memory.advice(load(), ON_CUDA, step).startswith(f"out of memory {words}")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("quickstart", []),
        ("quickstart", ["trainer.devices=2", "data.batch_size=6", "trainer.accumulate_grad_batches=3"]),
        ("parallel/quickstart", []),
        ("parallel/longnet_1m", ["data.batch_size=2"]),
    ],
)
def test_what_is_advised_can_be_typed_and_needs_what_it_says(name: str, overrides: list[str]) -> None:
    before = load(*overrides, name=name)
    needed = plan.of(before, GPU).peak
    told = ways(out_of_memory.advice(before, ON_CUDA, 3))
    assert len(told) >= 3
    peaks = []
    for items, words in told.items():
        r = load(*overrides, *items.split(), name=name)
        made = plan.of(r, GPU)
        assert words.startswith(f"{table.size(made.peak)}; ")
        assert made.peak < needed
        peaks.append(made.peak)
        if "the global batch stays" in words:
            assert made.tokens_per_step == plan.of(before, GPU).tokens_per_step
    assert peaks == sorted(peaks), "the best comes first"


@pytest.mark.soak
def test_what_helps_depends_on_the_recipe() -> None:
    def items(*overrides: str, name: str = "quickstart", error: Exception = ON_CUDA) -> set[str]:
        return set(ways(out_of_memory.advice(load(*overrides, name=name), error, 1)))

    batch, blocks = "data.batch_size=4 trainer.accumulate_grad_batches=2", "model.activation_checkpointing=blocks"
    divided = "trainer.devices=2 strategy.name=sequence_parallel strategy.sequence_parallel_size=2"
    fsdp = "trainer.devices=2 strategy.name=fsdp data.batch_size=4"
    assert items() == {batch, blocks, "data.seq_len=512", divided, fsdp}
    assert items(error=ON_CPU) == {batch, blocks, "data.seq_len=512"}, "more processes share the same memory"
    assert items(blocks, "data.batch_size=1") == {"data.seq_len=512", divided}
    on_cpu, deep = "model.activation_checkpointing=blocks_on_cpu", [blocks, "model.layers=32"]
    assert on_cpu in items(*deep) and on_cpu not in items(*deep, error=ON_CPU)
    long = items("data.seq_len=16384", "data.batch_size=2", error=ON_CPU)
    assert "model.ffn_chunk=16384" in long and "model.ffn_chunk=16384" not in items("data.seq_len=2048")
    odd = items("data.batch_size=3", "trainer.accumulate_grad_batches=2")
    assert odd == {"data.batch_size=1 trainer.accumulate_grad_batches=6", blocks, "data.seq_len=512", divided}
    heads = items("model.attention.backend=sdpa", "model.dim=129", "model.heads=3", "model.positions=none")
    assert not any("sequence_parallel" in item for item in heads), "three heads do not divide among two devices"
    large = ["trainer.devices=8", "model.dim=1024", "model.ffn_dim=4096", "data.batch_size=1", "data.seq_len=256"]
    assert "strategy.name=fsdp" in items(*large)
    nodes = items("trainer.devices=2", "trainer.num_nodes=2", name="parallel/quickstart")
    further = "strategy.name=sequence_parallel strategy.sequence_parallel_size=4"
    assert {item for item in nodes if "devices" in item} == {f"trainer.devices=8 trainer.num_nodes=1 {further}"}
    further = "strategy.name=sequence_parallel_fsdp strategy.sequence_parallel_size=16"
    assert f"trainer.devices=8 trainer.num_nodes=2 {further}" in items(name="parallel/longnet_1m")
    wide = items(*large, "trainer.num_nodes=2", "strategy.name=fsdp", "data.batch_size=2")
    assert "trainer.devices=8 trainer.num_nodes=4 strategy.name=fsdp data.batch_size=1" in wide


def test_it_is_said_whether_it_should_have_fitted() -> None:
    fits = out_of_memory.advice(load(), ON_CUDA, 1)
    assert "that should fit: something else takes memory there too" in fits and "still too much" not in fits
    best, second, *others = ways(fits)
    room = sum(plan.of(load(*items.split()), GPU).peak for items in (best, second)) / 2 / estimate.USABLE_MEMORY
    small = torch.OutOfMemoryError(f"Tried to allocate 2 MiB. GPU 0 has a total capacity of {room / 2**20:.3f} MiB of")
    none = out_of_memory.advice(load(), small, 1)
    assert "that should fit" not in none
    assert [items for items, words in ways(none).items() if "still too much" in words] == [second, *others]
    unknown = out_of_memory.advice(load(), RuntimeError("CUDA error: out of memory"), 1)
    assert "more memory could not be had on the GPU" in unknown
    assert "that should fit" not in unknown and "in all" in unknown and "inf" not in unknown


def test_a_plan_that_fails_leaves_the_advice(no_plan: None, monkeypatch: pytest.MonkeyPatch) -> None:
    r = load()
    told = out_of_memory.advice(r, ON_CPU, 3)
    assert told.startswith("out of memory in step 3 of 250: 8 GB more could not be had on the CPU\n")
    assert ways(told) == {
        "data.batch_size=4 trainer.accumulate_grad_batches=2": "the global batch stays",
        "model.activation_checkpointing=blocks": "each block is computed twice",
        "data.seq_len=512": "shorter contexts",
    }
    once_more = "trainer.devices=2 strategy.name=sequence_parallel strategy.sequence_parallel_size=2"
    assert ways(out_of_memory.advice(r, ON_CUDA, 3)) == ways(told) | {
        once_more: "each sequence on more devices",
        "trainer.devices=2 strategy.name=fsdp data.batch_size=4": "the global batch stays",
    }
    divided = load("trainer.devices=2", "strategy.name=fsdp")
    assert "strategy.name=fsdp" not in ways(out_of_memory.advice(divided, ON_CUDA, 3))
    shared = out_of_memory.advice(load(name="parallel/quickstart"), ON_CUDA, 3)
    assert not any("strategy.name=fsdp" in items for items in ways(shared)), "it would not keep the global batch"
    monkeypatch.setattr(recipe, "load", None)
    assert out_of_memory.advice(r, ON_CPU, 3).splitlines()[1:] == [out_of_memory.NOTHING]


def test_the_machines_own_memory_is_not_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "on_accelerator", lambda r: True)
    told = out_of_memory.advice(load("data.num_workers=4"), ON_CPU, 3)
    assert "beside the GPU's" in told and "lower data.num_workers, 4 now" in told and "in all" not in told
    assert "num_workers" not in out_of_memory.advice(load(), ON_CPU, 3)
    assert "in all" in out_of_memory.advice(load(), ON_CUDA, 3)


LIMITED = """
import resource, sys
from pathlib import Path
from longnet_kit import experiment, out_of_memory, plan, recipe
from longnet_kit.plan import estimate, machines

def limit(room):
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + room, resource.RLIM_INFINITY))
"""
BIG = """
name: big
model: {dim: 32, layers: 4, heads: 4, ffn_dim: 64, attention: {backend: naive}}
data: {source: files, paths: [text.txt], seq_len: 1024, batch_size: 16}
trainer: {max_steps: 1, limit_val_batches: 0, enable_progress_bar: false, accelerator: cpu}
"""
ROOM = 1_500_000_000
"""Bytes for a run that needs 2.6 GB, and half of a GB for threads and libraries that are not planned."""


def in_process(program: str, *arguments: str, folder: Path) -> str:
    command = [sys.executable, "-W", "ignore", "-c", LIMITED + program, *arguments]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the address space as Linux does")
@pytest.mark.soak
def test_a_run_that_ran_out_runs_with_what_is_advised_first(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text(BIG)
    (tmp_path / "text.txt").write_text("some lines, and others\n" * 15_000)
    program = f"""
r = recipe.load("big.yaml", sys.argv[1:])
limit({ROOM})
try:
    experiment.run(r)
except Exception as error:
    error = error.__cause__ or error
    assert out_of_memory.is_out_of_memory(error), error
    print(out_of_memory.advice(r, error, 1))
"""
    told = in_process(program, folder=tmp_path)
    assert re.search(r"out of memory in step 1 of 1: [\d.]+ MB more could not be had on the CPU", told)
    advised = ways(told)
    assert next(iter(advised)) == "data.seq_len=512"
    told = in_process(program, "data.seq_len=512", folder=tmp_path)
    assert "finished" in told and "out of memory" not in told


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the address space as Linux does")
@pytest.mark.soak
def test_advice_needs_next_to_no_memory(tmp_path: Path) -> None:
    program = """
r = recipe.load("quickstart", ["model.layers=1", "data.batch_size=4096"])
limit(64_000_000)
print(out_of_memory.advice(r, MemoryError(), 1))
"""
    told = in_process(program, folder=tmp_path)
    needed = plan.of(load("data.batch_size=4096"), machines.cpu(1)).peak
    assert needed > 50e9 and re.search(f"in all +{table.size(needed)}  of", told)
    assert {"data.batch_size=2048 trainer.accumulate_grad_batches=2", "data.seq_len=512"} <= ways(told).keys()
