"""Plans against what really happens: peaks of memory, elements exchanged, FLOPs; and what a plan says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longnet_kit import attention, cli, experiment, plan, recipe
from longnet_kit.attention.sharding import bind
from longnet_kit.parallel import threads
from longnet_kit.parallel.threads import ThreadShard
from longnet_kit.plan import chunks, estimate, machines, spread, step
from tests.parallel import ranks
from tests.plan import measured

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:no branch has dilation rate 1"),
    pytest.mark.filterwarnings("ignore:.*val_dataloader", "ignore:.*logging interval"),
    pytest.mark.timeout(600),
]
QUIET = ["trainer.limit_val_batches=0"]
SMALL = [*QUIET, "model.layers=3", "data.batch_size=2"]
WITHIN = 0.02
"""How far a plan may be from the measured peak of a process alone."""


def memory(*overrides: str) -> tuple[int, int]:
    """Planned and measured."""
    r = recipe.load("quickstart", [*SMALL, *overrides])
    return plan.plan("quickstart", [*SMALL, *overrides]).peak, measured.peak(r)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.layers=5"],  # deeper than what is run
        ["model.activation_checkpointing=blocks", "model.layers=5"],
        ["model.activation_checkpointing=blocks_on_cpu", "model.ffn_chunk=300", "model.loss_chunk=500"],
        ["model.ffn_chunk=300"],
        ["model.attention.backend=sdpa"],
        ["model.attention.backend=naive", "data.seq_len=256"],
        ["model.dropout=0.1"],
        ["optimizer.name=sgd"],
        ["trainer.accumulate_grad_batches=2"],
        ["trainer.precision=64-true"],
        ["trainer.precision=bf16-mixed"],
        ["trainer.gradient_clip_val=1.0"],
    ],
    ids=" ".join,
)
def test_the_peak_is_the_measured_one(overrides: list[str]) -> None:
    planned, found = memory(*overrides)
    assert planned == pytest.approx(found, rel=WITHIN)


@pytest.mark.parametrize(
    ("strategy", "below", "above"), [("sequence_parallel", 0.97, 1.03), ("sequence_parallel_fsdp", 0.95, 1.15)]
)
def test_the_peak_of_a_rank_is_the_measured_one(strategy: str, below: float, above: float, tmp_path: Path) -> None:
    """Of two processes; a model whose weights are much of it, so that dividing them counts.

    How many of FSDP's gathered blocks are alive depends on when gloo's threads let go of them: the same run measured
    262 to 300 MB, in steps of a block, here and there on either rank. The plan, 289 MB, has two blocks and their
    gradients. So it is held to the rank that measured less, and may be 5% below it.
    """
    overrides = [*SMALL, "trainer.devices=2", "trainer.accelerator=cpu", f"strategy.name={strategy}"]
    overrides += ["strategy.sequence_parallel_size=2", "model.dim=512", "model.ffn_dim=2048", "data.seq_len=512",
                  "data.batch_size=1", "model.layers=6"]  # fmt: skip
    planned = plan.plan("quickstart", overrides).peak
    ranks.finish(ranks.start(2, "tests.plan.measured", str(tmp_path / "peak"), "quickstart", *overrides))
    found = min(int((tmp_path / f"peak.{rank}").read_text()) for rank in range(2))
    assert below * found <= planned <= above * found


def exchanged(r: recipe.Recipe) -> list[tuple[int, int]]:
    """Elements that each rank received in a real forward and backward pass."""
    p = r.strategy.sequence_parallel_size
    weights = experiment.build_task(r).model.state_dict()  # type: ignore[union-attr]
    tokens = torch.randint(200, (r.data.batch_size, r.data.seq_len))

    def work(shard: ThreadShard) -> tuple[int, int]:
        model: Any = experiment.build_task(r).model
        model.load_state_dict(weights)
        bind(model, shard)
        hidden = model.hidden(tokens.chunk(p, 1)[shard.rank])
        forward = shard.received
        hidden.sum().backward()
        return forward, shard.received - forward

    return threads.run(p, work)


@pytest.mark.parametrize(
    "more",
    [
        ["model.attention.segment_lengths=[64,512,1024]", "model.attention.dilation_rates=[1,3,8]"],
        ["model.attention.segment_lengths=[64,768]", "model.attention.dilation_rates=[1,5]"],  # a shorter last segment
        ["model.attention.backend=sdpa"],
        ["model.activation_checkpointing=blocks"],
    ],
    ids=" ".join,
)
def test_volumes_are_those_that_are_counted(more: list[str]) -> None:
    """Of the busiest of four ranks."""
    overrides = [*SMALL, "strategy.name=sequence_parallel", "strategy.sequence_parallel_size=4", "trainer.devices=4",
                 "data.eval_contexts=[]", *more]  # fmt: skip
    made = plan.plan("quickstart", overrides)
    forward, rest = exchanged(made.recipe)[estimate.busiest(made.recipe, made.spread)]
    by_work = {work: sum(x for kind, x in made.step.elements.items() if kind.work == work) for work in
               ("forward", "recomputed", "backward")}  # fmt: skip
    assert by_work["forward"] == forward > 0
    assert by_work["recomputed"] + by_work["backward"] == rest
    assert made.exchange.elements_per_layer == forward // 3
    if more == ["model.attention.backend=sdpa"]:
        assert made.exchange.ulysses == made.exchange.attention, "trading heads is what this backend does"


def test_the_volume_is_the_designs_formula() -> None:
    """2 n H D times the sum over branches w > n of (w / n - 1) / r, for a layer's forward pass and each sequence."""
    made = plan.plan("parallel/longnet_1m", QUIET)
    n, dim = 2**17, 768
    expected = sum(2 * n * dim * (w / n - 1) / r for w, r in ((524_288, 256), (1_048_576, 512)))
    assert made.exchange.elements_per_layer == expected


def test_flops_are_those_that_are_counted() -> None:
    made = plan.plan("quickstart", SMALL)
    task = experiment.build_task(made.recipe)
    model: Any = task.model
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden(torch.randint(200, (2, 1024)))
        (hidden @ model.embedding.weight.T).sum().backward()
    assert made.step.flops.total() == counter.get_total_flops()
    assert made.imbalance == pytest.approx(1.0, abs=1e-3)
    again = plan.plan("quickstart", [*SMALL, "model.activation_checkpointing=blocks"]).step.flops
    assert (again["forward"], again["backward"]) == (made.step.flops["forward"], made.step.flops["backward"])
    blocks = made.step.flops["forward"] - 2 * 2 * 1024 * model.embedding.weight.numel()
    last = 3 * 2 * 2 * 1024 * 512 * 128  # each block's last product, which nothing needs again
    assert again["recomputed"] == blocks - last


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_chunks_that_are_not_run_are_planned_as_if_they_were(
    checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*SMALL, f"model.activation_checkpointing={checkpointing}", "model.ffn_chunk=64", "model.loss_chunk=64"]
    few = plan.plan("quickstart", overrides)
    monkeypatch.setattr(chunks, "CHUNKS", 2048)
    every = plan.plan("quickstart", overrides)
    assert few.peak == pytest.approx(every.peak, rel=WITHIN)
    assert few.step.saved == pytest.approx(every.step.saved, rel=WITHIN)
    for work in ("forward", "backward"):
        assert few.step.flops[work] == every.step.flops[work]
    assert few.step.flops["recomputed"] == pytest.approx(every.step.flops["recomputed"], rel=WITHIN)


def test_nothing_is_allocated_and_no_number_is_drawn() -> None:
    state = torch.get_rng_state()
    made = plan.plan("parallel/longnet_1m", gpu="h100")
    assert torch.equal(torch.get_rng_state(), state)
    assert made.step.parameters > 1e8 and made.fits


def test_a_million_tokens_fit_a_small_machine() -> None:
    made = plan.plan("long/million")
    assert made.recipe.data.seq_len == 2**20 and made.recipe.data.batch_size == 1
    assert made.peak < 10e9


@pytest.mark.soak
def test_a_plan_that_does_not_fit_says_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    """And what it says can be typed."""
    lengths = ["data.seq_len=16777216", "data.eval_contexts=[]", "strategy.sequence_parallel_size=8"]
    asked = ["plan", "parallel/longnet_1m", "gpu=a100", *lengths]
    assert cli.main([*asked, "devices=8"]) == 0
    told = capsys.readouterr().out
    assert "does not fit" in told
    line = next(line for line in told.splitlines() if line.startswith("fits with"))
    words, _, peak = line.removeprefix("fits with").strip().rpartition(": ")
    changed = [item for item in asked if item.partition("=")[0] not in words] + words.split()
    assert cli.main(changed) == 0
    again = capsys.readouterr().out
    assert f"peak {peak:>10}".split() == again[again.index("  peak ") :].split()[:3]
    assert "  fits: " in again


@pytest.mark.soak
def test_changes_are_tried_in_order_of_their_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointing before smaller batches before FSDP before more devices; each kept only if it helps."""
    whole = plan.plan("quickstart", QUIET)

    def planned(room: float) -> list[str]:
        small = machines.Machine("small", room, dict.fromkeys((torch.float32,), 1e12), 1e11, 1e10)
        monkeypatch.setitem(machines.GPUS, "small", small)
        return [words for words, _ in plan.plan("quickstart", QUIET, gpu="small").changes]

    assert planned(2 * whole.peak) == []
    assert planned(0.6 * whole.peak) == ["model.activation_checkpointing=blocks"]
    steps = planned(0.025 * whole.peak)
    assert steps[:2] == [
        "model.activation_checkpointing=blocks",
        "model.activation_checkpointing=blocks data.batch_size=1",
    ]
    assert "devices=2" in steps[2] and "strategy.sequence_parallel_size=2" in steps[2]


def test_offloaded_inputs_of_blocks_are_not_on_the_gpu() -> None:
    deep = [*SMALL, "model.layers=7"]
    kept, moved = (
        plan.plan("quickstart", [*deep, f"model.activation_checkpointing={way}"], gpu="h100")
        for way in ("blocks", "blocks_on_cpu")
    )
    inputs = 7 * 2 * 1024 * 128 * 4
    assert kept.step.saved - moved.step.saved == inputs
    assert moved.peak < kept.peak
    assert kept.step.flops == moved.step.flops
    here = plan.plan("quickstart", [*deep, "model.activation_checkpointing=blocks_on_cpu"])
    assert here.peak == plan.plan("quickstart", [*deep, "model.activation_checkpointing=blocks"]).peak, "it is a CPU"


def test_fsdp_divides_what_it_says() -> None:
    base = [*SMALL, "trainer.devices=4", "trainer.accelerator=cpu"]
    whole, divided = (plan.plan("quickstart", [*base, f"strategy.name={name}"]) for name in ("ddp", "fsdp"))
    assert divided.memory["optimizer state"] == pytest.approx(whole.memory["optimizer state"] / 4, rel=0.01)
    assert (
        divided.exchange.weights > whole.exchange.weights == 2 * 3 * whole.step.parameters
    )  # 3/4 of it, twice, 4 bytes


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["devices=x"], "devices=x: expected a whole number"),
        (["devices=0"], "devices is 0"),
        (["gpu=h10"], "did you mean 'h100'?"),
        (["devices=4", "trainer.devices=2"], "both say how many devices"),
        (["devices=4", "strategy.name=sequence_parallel", "strategy.sequence_parallel_size=3"], "the 4 devices"),
        (["modle.layers=3"], "did you mean model?"),
    ],
)
def test_wrong_plans(overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "quickstart", *overrides]) == 2
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("path", "overrides", "devices", "name", "shards"),
    [
        ("quickstart", [], None, "auto", 1),
        ("quickstart", [], 4, "sequence_parallel", 4),
        ("parallel/quickstart", [], 6, "sequence_parallel", 2),  # as in the recipe
        ("parallel/longnet_1m", [], 16, "sequence_parallel_fsdp", 8),
        ("backends/sdpa", [], 3, "auto", 1),  # four heads: data-parallel
        ("quickstart", ["strategy.name=ddp"], 4, "ddp", 1),
        ("quickstart", ["strategy.name=sequence_parallel"], 4, "sequence_parallel", 4),  # its size is not said
        (
            "quickstart",
            ["strategy.name=sequence_parallel", "strategy.sequence_parallel_size=1"],
            4,
            "sequence_parallel",
            1,
        ),
    ],
)
def test_what_a_number_of_devices_means(
    path: str, overrides: list[str], devices: int | None, name: str, shards: int
) -> None:
    r, assumed = spread.load(path, overrides, devices)
    s = spread.of(r)
    assert (r.strategy.name, s.shards, s.devices) == (name, shards, devices or 1)
    said = overrides not in ([], ["strategy.name=sequence_parallel"])
    assert bool(assumed) == (devices is not None and not said)


@pytest.mark.parametrize("name", ["passkey_longnet", "many_shot_dense", "listops_longnet", "file_classes_longnet"])
def test_the_step_of_every_task_is_planned(name: str) -> None:
    found = plan.plan(f"tasks/{name}", ["model.layers=1", "data.batch_size=2"])
    assert found.peak > 0


def test_a_backend_that_cannot_run_without_data_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    if "reads_numbers" not in attention.names():

        @attention.register("reads_numbers")
        class ReadsNumbers(attention.AttentionBackend):
            def forward(self, q, k, v, causal=True, key_padding_mask=None):  # type: ignore[no-untyped-def]
                return v * float(q.sum().numpy())

    assert cli.main(["plan", "quickstart", "model.attention.backend=reads_numbers"]) == 0
    told = capsys.readouterr().out
    assert "unknown   the attention backend does not run without data" in told and "peak" in told


def test_memory_that_runs_out_meanwhile_is_not_the_backends_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    real = step.run

    def run(*given: Any, opaque: bool = False, **named: Any) -> Any:
        if not opaque:
            raise MemoryError
        return real(*given, opaque=True, **named)

    monkeypatch.setattr(step, "run", run)
    with pytest.raises(MemoryError):
        plan.plan("quickstart", ["model.layers=1"])


def test_a_billion_tokens_on_paper(capsys: pytest.CaptureFixture[str]) -> None:
    """In its own process, since it must take seconds, not minutes."""
    lengths, rates = [2048, 2**17, 2**23, 2**26, 2**30], [1, 64, 4096, 2**15, 2**19]
    overrides: Sequence[str] = [
        "devices=2048", "gpu=h100", "data.seq_len=1073741824", "data.eval_contexts=[]",
        "strategy.name=sequence_parallel_fsdp", "strategy.sequence_parallel_size=2048",
        f"model.attention.segment_lengths={lengths}".replace(" ", ""),
        f"model.attention.dilation_rates={rates}".replace(" ", ""),
    ]  # fmt: skip
    command = [sys.executable, "-m", "longnet_kit.cli", "plan", "parallel/longnet_1m", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1,073,741,824 tokens" in done.stdout and "2048 x H100" in done.stdout
    assert "  fits: " in done.stdout and "by Ulysses instead" in done.stdout and "by a ring instead" in done.stdout
    assert estimate.COMPUTE_EFFICIENCY == 0.4 and "assumed: 40% of the device's peak rate" in done.stdout
