"""Which keys a recipe has: their types, ranges and defaults, as dataclasses; and what is asked of Trainer arguments.

Only what one key allows by itself is said here. How keys must fit together is in recipe_together.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

from longnet_kit.typed import Range

Count = Annotated[int, Range(at_least=1, at_most=2**40)]
Natural = Annotated[int, Range(at_least=0, at_most=2**40)]

STRATEGIES = ("auto", "ddp", "fsdp", "sequence_parallel", "sequence_parallel_fsdp")
"""What `strategy.name` may be; `auto` is `ddp` on several devices."""

SELECTORS = {"model.attention": "backend", "model.attention.pattern": "kind", "data": "source", "strategy": "name"}
"""Mappings whose other keys depend on one of them: a layer that changes that one starts the mapping afresh."""


@dataclass
class Model:
    """The network."""

    dim: Count = 128
    """Width of the residual stream; a multiple of `heads`."""
    layers: Count = 4
    """Number of transformer blocks."""
    heads: Count = 4
    """Attention heads per block."""
    ffn_dim: Count = 512
    """Width of the feed-forward layers."""
    dropout: Annotated[float, Range(at_least=0, below=1)] = 0.0
    """Probability of dropping an element of the embedding and of each sublayer's output."""
    positions: Literal["rope", "xpos", "none"] = "rope"
    """Position embedding; `xpos`, the paper's, is for causal models, and not for float16."""
    causal: bool = True
    """Whether a token sees only itself and those before it."""
    attention: dict[str, Any] = field(default_factory=lambda: {"backend": "dilated"})
    """`backend`, and the keys of that backend."""
    activation_checkpointing: Literal["none", "blocks", "blocks_on_cpu"] = "none"
    """`blocks`: keep only each block's input, and compute the rest again in the backward pass; `blocks_on_cpu`: keep
    those inputs in the CPU's memory."""
    ffn_chunk: Count | None = None
    """Tokens that go through the feed-forward layers at a time, which computes them again in the backward pass; null:
    all, and nothing twice."""
    loss_chunk: Count | None = None
    """Tokens whose logits are in memory at a time; null: as many as make 2^26 logits."""


@dataclass
class Data:
    """Text and how it is cut into batches. In YAML the source's own keys stand beside these."""

    source: str = "python_stdlib"
    """Name of a registered data source."""
    tokenizer: str = "bytes"
    """`bytes`, a `tokenizers` JSON file, or a tiktoken name."""
    seq_len: Count = 1024
    """Tokens in a sequence."""
    batch_size: Count = 8
    """Sequences per data rank and batch."""
    num_workers: Natural = 0
    """Loader processes; the samples drawn do not depend on it."""
    eval_contexts: list[Count] = field(default_factory=list)
    """Window lengths at which perplexity is also measured; clipped to `seq_len`."""
    options: dict[str, Any] = field(default_factory=dict)
    """The source's own keys."""


@dataclass
class Optimizer:
    """How weights are updated."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """Update rule."""
    lr: Annotated[float, Range(above=0, at_most=1000)] = 3.0e-3
    """Learning rate at the end of the warm-up."""
    betas: tuple[Annotated[float, Range(at_least=0, below=1)], Annotated[float, Range(at_least=0, below=1)]] = (
        0.9,
        0.98,
    )
    """Decay of the running means of the gradient and of its square; sgd has none."""
    eps: Annotated[float, Range(above=0, at_most=1000)] = 1.0e-8
    """Added to the root of the running mean square, by which an update is divided; must not be 0 in the dtype of the
    weights, as 1e-8 is in float16. sgd has none."""
    weight_decay: Annotated[float, Range(at_least=0, at_most=1000)] = 0.01
    """Strength of the pull of weight matrices towards zero."""
    warmup_steps: Natural = 0
    """Steps over which the learning rate rises from zero; clipped to `trainer.max_steps`."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """The course of the learning rate after the warm-up; `linear` and `cosine` end at zero."""
    max_skipped_steps: Natural = 0
    """Updates to leave out because the loss or a gradient is not finite; with one more, the run stops."""


@dataclass
class Checkpoint:
    """When the run is saved."""

    every_n_steps: Count = 500
    """Optimizer steps from one checkpoint to the next; the last step is always saved."""
    keep: Count = 3
    """How many of the newest checkpoints stay."""
    keep_best: bool = True
    """Whether a validation that is the best so far is saved, and stays until a better one."""


@dataclass
class Strategy:
    """How the work is spread over devices."""

    name: str = "auto"
    """One of `STRATEGIES`."""
    sequence_parallel_size: Count = 1
    """Ranks that share one sequence; divides the devices and `data.seq_len`."""
    timeout: Annotated[float, Range(above=0, at_most=1e9)] = 600.0
    """Seconds that ranks wait for one another before the job is brought down."""


@dataclass
class Recipe:
    """An experiment: everything that decides what a run does."""

    name: str
    """The run lands in runs/<name>/version_<n>."""
    description: str = ""
    """One line for `longnet list`."""
    extends: str | None = None
    """The recipe below this one, relative to its file; null in a loaded recipe, which is complete."""
    imports: list[str] = field(default_factory=list)
    """Modules that register plug-ins: `module`, or `folder/module`."""
    seed: Annotated[int, Range(at_least=0, at_most=2**32 - 1)] = 1234
    """Of the weights, the sampling and everything else that is random."""
    task: str = "language_modeling"
    """Name of a registered task."""
    init_from: str | None = None
    """Weights to start from, and nothing else: a run directory, a checkpoint or an exported file."""
    resume: str | None = None
    """null, `auto` (the newest run of this name goes on), or a run directory or checkpoint that a new run continues."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    trainer: dict[str, Any] = field(default_factory=lambda: dict(TRAINER_DEFAULTS))
    """Arguments of lightning.Trainer; `max_steps` is required."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    strategy: Strategy = field(default_factory=Strategy)
    notes: list[str] = field(default_factory=list, compare=False)
    """What loading changed, for the user to read; not part of the file."""


SECTIONS: dict[str, type] = {
    "model": Model,
    "data": Data,
    "optimizer": Optimizer,
    "checkpoint": Checkpoint,
    "strategy": Strategy,
}
"""The mappings of a recipe that are dataclasses; `trainer` is the other one."""

TRAINER_DEFAULTS: dict[str, Any] = {
    "devices": 1,
    "precision": "32-true",
    "log_every_n_steps": 10,
    "gradient_clip_val": None,
}
"""The kit's own defaults where they differ from Lightning's."""

_Share = Annotated[float, Range(at_least=0, at_most=1)]


@dataclass
class TimeSpan:
    """A length of time, as datetime.timedelta takes it."""

    weeks: Annotated[float, Range(at_least=0)] = 0
    days: Annotated[float, Range(at_least=0)] = 0
    hours: Annotated[float, Range(at_least=0)] = 0
    minutes: Annotated[float, Range(at_least=0)] = 0
    seconds: Annotated[float, Range(at_least=0)] = 0


class Trainer:
    """Trainer arguments for which the kit is stricter than Lightning's signature."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"]
    devices: Literal["auto"] | Count | list[Natural]
    num_nodes: Count
    precision: Literal[
        "32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "transformer-engine",
        "transformer-engine-float16",
    ]  # fmt: skip
    max_steps: Count
    max_time: str | TimeSpan | None
    limit_val_batches: Natural | _Share | None
    limit_test_batches: Natural | _Share | None
    limit_predict_batches: Natural | _Share | None
    val_check_interval: Count | Annotated[float, Range(above=0, at_most=1)] | None
    check_val_every_n_epoch: Count | None
    num_sanity_val_steps: Annotated[int, Range(at_least=-1)] | None
    log_every_n_steps: Count | None
    accumulate_grad_batches: Count
    gradient_clip_val: Annotated[float, Range(at_least=0)] | None
    gradient_clip_algorithm: Literal["norm", "value"] | None
    profiler: Literal["simple", "advanced", "pytorch"] | None


TRAINER_TYPES: dict[str, Any] = get_type_hints(Trainer, include_extras=True)

_KIT = "the kit sets it itself"
_STEPS = "a run is measured in optimizer steps: set trainer.max_steps"
_WHOLE = "it changes what a run means: lower trainer.max_steps and trainer.limit_val_batches for a short one"
TRAINER_REFUSED: dict[str, str] = {
    "logger": f"{_KIT}: every run logs to TensorBoard and metrics.csv in its directory",
    "callbacks": f"{_KIT}; a recipe cannot hold objects",
    "plugins": "a recipe cannot hold objects; for the precision, set trainer.precision",
    "strategy": "it has a section of its own: set strategy.name",
    "default_root_dir": f"{_KIT}: a run lands in runs/<name>, so set name",
    "enable_checkpointing": "the checkpoint section says when a run is saved",
    "enable_model_summary": f"{_KIT}; `longnet show` counts the parameters",
    "use_distributed_sampler": f"{_KIT}: the data module shards its samples by itself",
    "reload_dataloaders_every_n_epochs": f"{_KIT}: a run has one epoch",
    "barebones": f"{_KIT}: it would turn the logging off",
    "fast_dev_run": _WHOLE,
    "overfit_batches": _WHOLE,
    "max_epochs": _STEPS,
    "min_epochs": _STEPS,
    "min_steps": _STEPS,
    "limit_train_batches": _STEPS,
}
"""Trainer arguments that a recipe must not give, and why."""


def listed_on_cpu(devices: Any) -> str:
    """Why a list of devices is none where the run is on the CPU."""
    return f"got {devices}, a list of devices, but the run is on the CPU: give a number of processes, like 1"


def names(section: type) -> list[str]:
    """The keys of a section as they stand in YAML."""
    return [f.name for f in dataclasses.fields(section) if f.name not in ("options", "notes")]
