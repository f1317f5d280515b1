"""The strategies from plain Lightning code: any LightningModule, registered names, sizes, precision, worker seeds."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from longnet_kit import attention
from longnet_kit.attention.sharding import bind
from longnet_kit.parallel import SequenceParallelFSDPStrategy, SequenceParallelStrategy, batches, threads
from longnet_kit.parallel.strategies import is_about_transfers
from tests.parallel import desk, ranks

pytestmark = [pytest.mark.filterwarnings("ignore:.*does not have many workers"), pytest.mark.timeout(600)]


def test_strategies_are_registered_by_name() -> None:
    assert isinstance(Trainer(strategy="sequence_parallel", accelerator="cpu").strategy, SequenceParallelStrategy)
    fsdp = Trainer(strategy="sequence_parallel_fsdp", accelerator="cpu", precision="64-true").strategy
    assert isinstance(fsdp, SequenceParallelFSDPStrategy)


@pytest.mark.parametrize("kind", [SequenceParallelStrategy, SequenceParallelFSDPStrategy])
@pytest.mark.parametrize("size", [0, -2, 1.5, True, "all"])
def test_a_size_that_is_none_is_refused(kind: Any, size: Any) -> None:
    with pytest.raises(
        ValueError, match="sequence_parallel_size is .*, expected a whole number of at least 1, or 'auto'"
    ):
        kind(size)


@pytest.mark.parametrize("kind", [SequenceParallelStrategy, SequenceParallelFSDPStrategy])
def test_a_size_that_does_not_divide_the_devices_is_refused_before_any_process_starts(kind: Any) -> None:
    trainer = Trainer(accelerator="cpu", devices=4, strategy=kind(3), logger=False)
    with pytest.raises(ValueError, match="does not divide the 4 devices; use one of 1, 2, 4, or 6 devices"):
        trainer.strategy.setup_environment()


def test_the_data_axis_counts_groups() -> None:
    strategy = Trainer(accelerator="cpu", devices=4, strategy=SequenceParallelStrategy(2), logger=False).strategy
    strategy.cluster_environment._global_rank = 3  # type: ignore[union-attr]
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 2, "rank": 1}  # type: ignore[union-attr]


def test_errors_of_the_transport_are_told_from_those_of_the_computation() -> None:
    """By torch's own classes, by their words, and by where they were raised."""
    assert is_about_transfers(torch.distributed.DistBackendError("x"))
    for words in ("[gloo/pair.cc:537] Read error", "NCCL watchdog", "Application timeout caused pair closure"):
        assert is_about_transfers(RuntimeError(words))
    assert not is_about_transfers(RuntimeError("shapes do not match"))
    assert not is_about_transfers(ValueError("gloo"))
    raised_in_a_transfer: dict[str, Any] = {"__name__": "torch.distributed.distributed_c10d"}
    exec("def wait(): raise RuntimeError('in words never seen before')", raised_in_a_transfer)
    with pytest.raises(RuntimeError) as caught:
        raised_in_a_transfer["wait"]()
    assert is_about_transfers(caught.value)


def test_a_bound_model_can_be_copied() -> None:
    model = nn.Sequential(attention.build({"backend": "sdpa"}))

    def work(shard: threads.ThreadShard) -> bool:
        own = copy.deepcopy(model)
        bind(own, shard)
        return copy.deepcopy(own)[0].shard is shard

    assert threads.run(2, work) == [True, True]
    assert model[0].shard is None


class Frames(Dataset):
    """Sequences of vectors with a label each, a padding mask, and a number that a worker draws at random."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(index)
        mask = torch.arange(24) < 13 + index
        drawn = torch.rand(())  # differs between workers, unless they are seeded alike
        frames, label = torch.randn(24, 16, generator=g), torch.tensor(index % 2)
        return {"frames": frames, "mask": mask, "label": label, "drawn": drawn, "spectrum": torch.zeros(7)}


class Classifier(LightningModule):
    """A LightningModule that knows nothing of this kit but an attention backend: mean-pooled, not causal, padded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.attention = attention.build({"backend": "dilated", "segment_lengths": [6, 24], "dilation_rates": [1, 5]})
        self.head = nn.Linear(16, 2)
        self.seen: list[tuple[int, ...]] = []
        self.gradients: dict[str, Tensor] = {}
        self.drawn: list[float] = []

    def shard_batch(self, batch: dict[str, Tensor], shard: Any) -> dict[str, Tensor]:
        """Which of two second dimensions is the sequence, only the module knows."""
        spectrum = batch.pop("spectrum")
        return {**batches.cut(batch, shard), "spectrum": spectrum}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x, mask = batch["frames"], batch["mask"]
        self.seen.append(tuple(x.shape))
        assert batch["spectrum"].shape[1] == 7, "this module's own shard_batch keeps it whole"
        self.drawn += batch["drawn"].tolist()
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, 4, 4)).unbind(2)
            x = x + self.attention(q, k, v, causal=False, key_padding_mask=mask).flatten(2)
        sums, counts = (x * mask[..., None]).sum(1), mask.sum(1)
        shard = getattr(self.trainer.strategy, "shard", None)
        if shard is not None:  # the mean over the sequence: each rank's sum, over the count of all
            counts = shard.all_gather(counts[None])().sum(0)
            sums = Sum.apply(sums, shard)
        return nn.functional.cross_entropy(self.head(sums / counts[:, None]), batch["label"])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients = {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in self.named_parameters()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sum(torch.autograd.Function):
    """The sum over the ranks of a sequence, each of which makes the same loss of it: averaged, that loss's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Any) -> Tensor:
        ctx.size = shard.size
        return shard.all_gather(x[None])().sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.size, None


def fit(strategy: Any, devices: int) -> Classifier:
    from lightning import seed_everything

    seed_everything(11, workers=True, verbose=False)
    module = Classifier()
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, precision="64-true", max_steps=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Frames(), batch_size=8, num_workers=2))
    assert module.attention.shard is None, "after training the module is for whole sequences again"
    return module


@pytest.mark.parametrize("strategy", ["sequence_parallel", "sequence_parallel_fsdp"])
def test_any_lightning_module_trains_on_shards(strategy: str, tmp_path: Any) -> None:
    """Lightning's own sampler, which shuffles (a batch is all there is), registered names, padding, a loss over the
    sequence; and the workers of a group draw alike."""
    alone = fit("auto", 1)
    ranks.finish(ranks.start(2, "tests.parallel.plain", strategy, str(tmp_path)))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert alone.seen == [(8, 24, 16)] * 2 and found[0]["seen"] == found[1]["seen"] == [(8, 12, 16)] * 2
    assert found[0]["drawn"] == found[1]["drawn"]
    for name, gradient in alone.gradients.items():
        for rank in (0, 1):
            torch.testing.assert_close(found[rank]["gradients"][name], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("code", "own"), [(-9, 1), (2, 2), (0, 7)])
def test_a_first_rank_that_waits_ends_when_another_has_failed(code: int, own: int) -> None:
    """With 2 where the other refuses the recipe, else 1; without a failure it goes on to its own end, here 7."""
    child = f"import os, sys; os.kill(os.getpid(), 9) if {code} < 0 else sys.exit({code})"
    program = (
        "import subprocess, sys, threading, time\n"
        "from longnet_kit.parallel import strategies\n"
        "strategies._GRACE = 0.1\n"
        f"other = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "threading.Thread(target=strategies._watch, args=([other],), daemon=True).start()\n"
        f"time.sleep({1.5 if code == 0 else 60})\n"
        "sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], env=desk.environment(), timeout=60).returncode == own
