"""What a training step costs beside its mathematics: the Trainer against a bare loop, and where the time goes.

    .venv/bin/python tools/bench_step.py [RECIPE] [key.path=value ...] [--steps 30]

By default one layer of the paper's width on 16,384 tokens. The recipe runs as `longnet fit` runs it, logging,
callbacks and data included, one batch a step. After each of its steps a bare loop (a copy of the network, the same
batch, precision, loss, backward, optimizer) takes one too, so that both meet the same machine; the first five of each
do not count. Then a step of the
bare loop is profiled: each part's share of the time, and of the FLOPs beside it (10 D per pair and head in attention's
backward, two products for each of the forward's elsewhere).
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import measure
import torch
from lightning import Callback
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from longnet_kit import experiment, fitting, recipe
from longnet_kit.model.loss import token_losses

DEFAULT = [
    "model.dim=768", "model.heads=12", "model.layers=1", "model.ffn_dim=3072", "model.attention.backend=dilated",
    "model.attention.segment_lengths=[2048,4096,8192,16384]", "model.attention.dilation_rates=[1,2,4,8]",
    "data.seq_len=16384", "data.batch_size=1", "data.eval_contexts=[]", "trainer.limit_val_batches=0",
]  # fmt: skip
SKIPPED = 5

ATTENTION = (
    "longnet_kit::dilated", "longnet_kit::dilated_backward", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_backward", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_cudnn_attention_backward",
)  # fmt: skip
PARTS = {
    "matrix products": ("mm", "linear", "matmul"),
    "layer norms": ("layer_norm",),
    "GELU": ("gelu",),
    "loss": ("log_softmax", "nll_loss"),
    "optimizer": ("Optimizer", "_fused_adam", "foreach", "addcdiv", "lerp"),
}
"""Parts by what the names of their operations hold, the first that fits; the rest is elementwise work and copies."""


class BareLoop(Callback):
    """Takes a step of its own after each of the Trainer's, and notes how long both took."""

    def __init__(self) -> None:
        self.own: list[float] = []
        self.trainers: list[float] = []
        self._left = 0.0

    def on_train_start(self, trainer: Any, task: Any) -> None:
        self.model = copy.deepcopy(task.model)
        made = task.configure_optimizers()
        optimizer = made["optimizer"]
        groups, theirs = (
            optimizer.param_groups,
            dict(zip(task.model.parameters(), self.model.parameters(), strict=True)),
        )
        options = [{**group, "params": [theirs[p] for p in group["params"]]} for group in groups]
        self.optimizer = type(optimizer)(options)
        self.clip = trainer.gradient_clip_val
        self.precision = trainer.precision_plugin.forward_context

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        began = measure.now(batch["tokens"].device)
        if self._left:
            self.trainers.append(began - self._left)
        self.batch = {name: x.clone() for name, x in batch.items()}
        self.own.append(measure.seconds(self.step, self.batch["tokens"].device))
        self._left = measure.now(batch["tokens"].device)

    def step(self) -> None:
        tokens, targets = self.batch["tokens"], self.batch["targets"]
        with self.precision():
            hidden: Tensor = self.model.hidden(tokens)
            loss = token_losses(hidden, self.model.embedding.weight, targets, self.model.loss_chunk).mean()
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def train(r: recipe.Recipe) -> BareLoop:
    """Run the recipe with a bare loop beside it."""
    loop, watchers = BareLoop(), fitting.watchers
    fitting.watchers = lambda *arguments: [*watchers(*arguments), loop]
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            experiment.run(r)
        finally:
            os.chdir(here)
    return loop


def shares(loop: BareLoop, device: torch.device) -> Counter[str]:
    """Seconds of each part of a step: on CUDA those of its kernels."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    clock = "device" if device.type == "cuda" else "cpu"
    with profile(activities=kinds) as profiler:
        loop.step()
    spent: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time its operation has too
        own = getattr(event, f"self_{clock}_time_total") / 1e6
        above, names = event, []
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        found = (part for name in names for part, marks in PARTS.items() if any(mark in name for mark in marks))
        part = "attention" if any(name in ATTENTION for name in names) else next(found, "elementwise and copies")
        spent[part] += own
    return spent


def main() -> None:
    parser = measure.parser(__doc__, "step")
    parser.add_argument("recipe", nargs="*", help="a recipe, and overrides key.path=value")
    parser.add_argument("--steps", type=int, default=30)
    given = measure.options(parser)
    path = given.recipe[0] if given.recipe and "=" not in given.recipe[0] else "quickstart"
    overrides = [item for item in given.recipe if "=" in item] or DEFAULT
    r = recipe.load(path, [*overrides, f"trainer.max_steps={given.steps}"])
    if r.trainer.get("accumulate_grad_batches", 1) > 1:
        parser.error("trainer.accumulate_grad_batches: the loops are compared step by step, one batch each")
    loop = train(r)
    device = loop.batch["tokens"].device
    own, trainers = loop.own[SKIPPED + 1 :], loop.trainers[SKIPPED:]
    tokens = loop.batch["tokens"].numel()
    # Sums, since what the Trainer does every few steps counts; and the median of the rounds, which no outlier moves.
    rows = [
        {"loop": "bare", "ms a step": measure.median_ms(own), "tokens/s": tokens * len(own) / sum(own)},
        {"loop": "Trainer", "ms a step": measure.median_ms(trainers), "tokens/s": tokens * len(own) / sum(trainers)},
    ]
    print(f"\n{measure.machine(device)}; {len(own)} steps of {tokens:,} tokens\n")
    measure.show(rows)
    print(
        f"\nTrainer over bare loop, tokens/s: {sum(own) / sum(trainers):.3f} of all steps, "
        f"{measure.ratio(own, trainers):.3f} in the median\n"
    )
    spent = shares(loop, device)
    backends = loop.model.attention_backends
    heads, width = r.model.heads, r.model.dim // r.model.heads
    pairs = sum(backend.flops(r.data.seq_len, heads, width, r.model.causal) or 0 for backend in backends)
    whole = loop.model.flops(r.data.seq_len)
    flops = {} if whole is None else {"attention": 3.5 * pairs, "matrix products": 3.0 * (whole - pairs)}
    flops = {part: r.data.batch_size * count for part, count in flops.items()}
    parts = [
        {
            "part": part,
            "ms": taken * 1e3,
            "share of time": taken / sum(spent.values()),
            "share of FLOPs": flops[part] / sum(flops.values()) if part in flops else None,
            "GFLOP/s": flops[part] / taken / 1e9 if part in flops else None,
        }
        for part, taken in spent.most_common()
    ]
    measure.show(parts)
    if flops:
        of_time, of_flops = spent["attention"] / sum(spent.values()), flops["attention"] / sum(flops.values())
        print(f"\nattention's share of the time over its share of the FLOPs: {of_time / of_flops:.3f}")
    results: dict[str, Any] = {"loops": rows, "parts": parts, "own": own, "trainers": trainers}
    measure.write(given.json, device, recipe=recipe.to_dict(r), **results)
    measure.draw_bars({part["part"]: part["share of time"] for part in parts}, given.plot, "share of a step's time")


if __name__ == "__main__":
    main()
