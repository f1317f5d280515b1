"""Throughput: every token counted once, validation not counted, and MFU from counted FLOPs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback

from longnet_kit.callbacks import Throughput, throughput
from tests.tasks.tiny import BATCH, SEQ_LEN, Data, Windows, logged, task, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Clock:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(throughput, "_clock", lambda device: self.now)
        monkeypatch.setattr(throughput, "peak_flops", lambda device, dtype: 1e6)
        monkeypatch.setattr(throughput, "measured_flops", lambda *_, **__: 0.0)


class Pace(Callback):
    """A second per micro-batch (20 for the first), 50 per validation, and 30 after it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.batches = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.now += 1.0 if self.batches else 20.0
        self.batches += 1

    def on_validation_batch_end(self, *_: Any) -> None:
        self.clock.now += 50

    def on_validation_end(self, *_: Any) -> None:
        self.clock.now += 30


@pytest.mark.parametrize("accumulate", [1, 3])
def test_tokens_of_every_micro_batch_count_and_validation_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    clock = Clock(monkeypatch)
    ours = task(6)
    run = trainer(
        tmp_path,
        Throughput(window=2),
        Pace(clock),
        max_steps=6,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
        val_check_interval=2 * accumulate,
    )
    run.fit(ours, datamodule=Data(BATCH))
    found = logged(tmp_path)
    # The first step, which took longer, is left out although the window reaches it.
    per_second = BATCH * SEQ_LEN
    assert found["train/tokens_per_second"] == pytest.approx(dict.fromkeys((2, 4, 6), per_second))
    flops = ours.model.flops(SEQ_LEN)
    assert flops is not None
    assert found["train/mfu"] == pytest.approx(dict.fromkeys((2, 4, 6), 3 * flops * BATCH / 1e6))


def test_the_tokens_of_all_ranks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do their devices: the same rate per device is the same MFU."""
    recorded: dict[int, dict[str, float]] = {}
    ours = task()
    for ranks in (1, 4):
        clock = Clock(monkeypatch)
        monkeypatch.setattr(
            throughput, "record", lambda module, rates, step, ranks=ranks: recorded.update({ranks: rates})
        )
        loop = SimpleNamespace(_should_accumulate=lambda: False)
        run = SimpleNamespace(
            world_size=ranks, precision="32-true", global_step=0, max_steps=9, log_every_n_steps=1, fit_loop=loop
        )
        callback = Throughput()
        callback.on_train_start(run, ours)  # type: ignore[arg-type]
        run.global_step, clock.now = 1, clock.now + 2
        callback.on_train_batch_end(run, ours, None, Windows(9).batch(0, 1), 0)  # type: ignore[arg-type]
    assert recorded[1]["train/tokens_per_second"] == SEQ_LEN
    assert recorded[4]["train/tokens_per_second"] == 4 * SEQ_LEN
    assert recorded[4]["train/mfu"] == pytest.approx(recorded[1]["train/mfu"])


def test_a_run_of_one_step_has_a_rate_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    trainer(tmp_path, Throughput(), Pace(clock), max_steps=1).fit(task(1), datamodule=Data())
    assert logged(tmp_path)["train/tokens_per_second"] == {1: pytest.approx(BATCH * SEQ_LEN / 20)}


def test_the_window_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    class Slowing(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            clock.now += 1 if trainer.global_step < 6 else 4

    trainer(tmp_path, Throughput(window=2), Slowing(), max_steps=10).fit(task(10), datamodule=Data())
    rates = logged(tmp_path)["train/tokens_per_second"]
    assert rates[6] == pytest.approx(BATCH * SEQ_LEN)
    assert rates[7] == pytest.approx(BATCH * SEQ_LEN * 2 / 5)
    assert rates[8] == pytest.approx(BATCH * SEQ_LEN / 4)


def test_no_mfu_where_flops_are_unknown(tmp_path: Path) -> None:
    ours = task(2)
    ours.model.attention_backends[0].flops = lambda *_: None  # type: ignore[method-assign, assignment]
    trainer(tmp_path, Throughput(), max_steps=2).fit(ours, datamodule=Data())
    found = logged(tmp_path)
    assert set(found["train/tokens_per_second"]) == {1, 2}
    assert "train/mfu" not in found


def test_the_measured_rate_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 3, 10, 11, 20, 22])  # three products of 3, 1 and 2 seconds
    deadline = iter([0, 3, 11, 22])  # the first starts the count of 15
    monkeypatch.setattr(throughput, "_clock", lambda device: next(ticks))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(deadline))
    cpu = torch.device("cpu")
    assert throughput.measured_flops(cpu, torch.float32, seconds=15, size=10) == 2 * 10**3 / 1


@pytest.mark.parametrize("per_batch", [0.11, 1.0, 3.0])
def test_a_machine_that_was_busy_at_the_start_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_batch: float
) -> None:
    """In under half a hundredth of the run, and that time counts no more than a validation's."""
    clock, bursts = Clock(monkeypatch), []
    rates = iter([4e6, 2e6] + 60 * [1e6])  # the clock's machine made 1e6 at the start

    def measured(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
        clock.now += seconds
        bursts.append(seconds)
        return next(rates)

    class Steady(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock.now += per_batch

    monkeypatch.setattr(throughput, "measured_flops", measured)
    ours = task(60)
    trainer(tmp_path, Throughput(), Steady(), max_steps=60, log_every_n_steps=1).fit(ours, datamodule=Data())
    assert 0 < sum(bursts) <= 0.005 * 60 * per_batch + 0.01
    found = logged(tmp_path)
    per_second = BATCH * SEQ_LEN / per_batch
    assert found["train/tokens_per_second"] == pytest.approx(dict.fromkeys(range(1, 61), per_second))
    flops = ours.model.flops(SEQ_LEN)
    assert flops is not None
    first = next(step for step in range(1, 61) if step * per_batch >= 4)
    expected = {step: 3 * flops / SEQ_LEN * per_second / (1e6 if step < first else 4e6) for step in range(1, 61)}
    assert found["train/mfu"] == pytest.approx(expected)


def test_measuring_leaves_the_random_numbers_of_a_run_alone() -> None:
    state = torch.get_rng_state()
    throughput.measured_flops(torch.device("cpu"), torch.float32, seconds=0.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_dtype_can_be_measured(dtype: torch.dtype) -> None:
    assert throughput.measured_flops(torch.device("cpu"), dtype, seconds=0.01, size=64) > 1e6


def test_the_vendors_figure_is_used_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {torch.bfloat16: 989, torch.float64: None}
    monkeypatch.setattr(throughput, "get_available_flops", lambda device, dtype: known[dtype])
    monkeypatch.setattr(throughput, "measured_flops", lambda device, dtype: 7.0)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert throughput.peak_flops(cuda, torch.bfloat16) == 989
    assert throughput.peak_flops(cuda, torch.float64) == 7
    assert throughput.peak_flops(cpu, torch.bfloat16) == 7
