"""A trained network out of a run or an exported file, ready to be given text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from longnet_kit import attention, model, placement, recipe, runs, tasks, terminal, weights
from longnet_kit.attention.patterns import Dilated
from longnet_kit.data import tokenizers
from longnet_kit.data.tokenizers import Tokenizer
from longnet_kit.errors import UserError
from longnet_kit.model import Transformer
from longnet_kit.recipe import Recipe


@dataclass
class Trained:
    """A network in evaluation mode, on its device, with the tokenizer that it was trained with."""

    network: Transformer
    tokenizer: Tokenizer
    recipe: Recipe
    weights: Path
    """The checkpoint or exported file."""
    step: int
    """Optimizer steps that it was trained for."""
    added: list[tuple[int, int]]
    """Branches (w, r) that it was not trained with."""

    @property
    def device(self) -> torch.device:
        return self.network.embedding.weight.device

    @property
    def branches(self) -> list[tuple[int, int]]:
        """(w, r) of every branch, the added ones too; [] where the attention has none."""
        return self.network.attention_backends[0].branches

    @contextmanager
    def computing(self) -> Iterator[None]:
        """In it the network computes as the recipe's precision says, without autograd."""
        precision = placement.precision(self.recipe)
        dtype = model.compute_dtype(precision)
        mixed = not precision.endswith("true") and dtype not in (torch.float32, torch.float64)
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=dtype, enabled=mixed):
            yield

    def reach(self) -> str:
        """In words, how far a token sees, and by which branches."""
        if not self.branches:
            return f"{self.recipe.model.attention['backend']} attention, which keeps every token"
        trained = [branch for branch in self.branches if branch not in self.added]
        longest = max(w for w, _ in self.branches)
        if self.added:
            return (
                f"{len(trained)} branches as trained, up to {max(w for w, _ in trained):,} tokens, and "
                f"{len(self.added)} more by doubling (w, r), up to {longest:,}"
            )
        return f"{len(trained)} branches as trained: a token sees its segment, of {longest:,} tokens at most"


def load(
    source: str | Path, reach: int | None = None, device: str | None = None, say: runs.Say = terminal.tell
) -> Trained:
    """Load a network.

    Args:
        source: a run directory, runs/<name> (see `runs.find`), a recipe whose run is in runs/<its name>, or an
            exported file. Of a run its newest checkpoint is taken.
        say: takes which checkpoint that is.
        reach: tokens up to which a token is to see back; where the longest segment is shorter, branches are added to it
            by doubling its length and rate. None: as trained.
        device: `cpu` or `cuda`; by default the recipe's accelerator where it is there.

    Raises:
        UserError: there is no such network, its weights do not fit, its tokenizer cannot be had, or `reach` is given
            and its attention has no branches.
    """
    r, path = find(source, say)
    task: Any = tasks.registry.get(r.task)
    if not getattr(task, "predicts_tokens", True):
        raise UserError(
            f"{source} was trained for the task {r.task}, whose network predicts no next token, so it can neither "
            "generate text nor stream it; `longnet test` measures it"
        )
    added: list[tuple[int, int]] = []
    if reach is not None:
        added = _further_branches(r, reach)
        r = replace(r, model=replace(r.model, attention=_with(r.model.attention, added)))
    tokenizer = tokenizers.build(r.data.tokenizer)
    dtype = model.compute_dtype(placement.precision(r))
    network = model.build(r.model, tokenizer.vocab_size, r.data.seq_len, dtype=dtype)
    if placement.precision(r).endswith("true"):
        network.to(dtype)
    saved = weights.read(path)
    network.load_state_dict(weights.fitting(network, path, saved))
    step = _exported_step(path) if path.suffix == weights.EXPORTED else int(saved.get("global_step", 0))
    return Trained(network.to(_device(r, device)).eval(), tokenizer, r, path, step, added)


def find(source: str | Path, say: runs.Say = terminal.tell) -> tuple[Recipe, Path]:
    """The recipe of a network, and the file of its weights; `source` as of `load`.

    Raises:
        UserError: there is no such network.
    """
    source = Path(source)
    return _exported(source) if source.suffix == weights.EXPORTED else _of_run(source, say)


def _of_run(source: Path, say: runs.Say) -> tuple[Recipe, Path]:
    if source.suffix == ".ckpt":
        raise UserError(f"{source} is a checkpoint; give the run that it is of, or `longnet export` it first")
    if not os.path.isdir(source):  # False for a name that no folder can have
        source = runs.ROOT / recipe.load(source).name
    path = runs.newest(source, say)
    return recipe.load_saved(runs.of_checkpoint(path)), path


def _exported(source: Path) -> tuple[Recipe, Path]:
    metadata = _metadata(source)
    if "recipe" not in metadata:
        raise UserError(f"{source} holds no recipe, so it was not made by `longnet export`; give one that was")
    return recipe.loads(metadata["recipe"], source, ["init_from=null", "resume=null"]), source


def _exported_step(source: Path) -> int:
    step = _metadata(source).get("step", "")
    return int(step) if step.isascii() and step.isdigit() else 0


def _metadata(source: Path) -> dict[str, str]:
    if not source.is_file():
        raise UserError(f"{source} does not exist; give a run directory, or a file that `longnet export` wrote")
    try:
        with safe_open(source, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{source} is no safetensors file, or is damaged ({error}); export it again") from error


def _device(r: Recipe, name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() and placement.on_accelerator(r) else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device(name)


def _further_branches(r: Recipe, reach: int) -> list[tuple[int, int]]:
    """What is to be added to the recipe's branches, by doubling the longest."""
    backend = attention.build(r.model.attention)
    pattern = backend.pattern
    if not isinstance(pattern, Dilated) or r.model.attention["backend"] != "dilated":
        raise UserError(
            f"--extend adds branches to the attention backend dilated, and this network has "
            f"{r.model.attention['backend']}; leave --extend out"
        )
    if isinstance(backend.branch_logits, nn.Parameter):
        raise UserError(
            "--extend adds branches, and this network has mixing: learned, a trained weight per branch, of which added "
            "branches have none; leave --extend out"
        )
    w, rate = max(pattern.branches)
    added = []
    while w < reach:
        w, rate = 2 * w, 2 * rate
        added.append((w, rate))
    return added


def _with(options: dict[str, Any], added: list[tuple[int, int]]) -> dict[str, Any]:
    branches = [*attention.build(options).branches, *added]
    lengths, rates = (list(numbers) for numbers in zip(*branches, strict=True))
    return {**options, "segment_lengths": lengths, "dilation_rates": rates}
