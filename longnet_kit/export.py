"""`longnet export`: a run's weights and its recipe in one safetensors file, which programs without this kit read too.

Tensors are named as in the bare network's state_dict and keep their dtype. The metadata, all text: `format` (pt),
`recipe` (YAML, as `recipe.load` reads it from a file), `step`, `longnet_kit` (the version that wrote the file).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import longnet_kit
from longnet_kit import durable, recipe, runs, terminal, typed, weights
from longnet_kit.errors import UserError
from longnet_kit.report import table


def export(run: str | Path, output: str | Path, checkpoint: str | Path | None = None) -> Path:
    """Write the weights of a run and its recipe; which step it was is printed.

    Args:
        run: a run directory, runs/<name> (see `runs.find`), or a recipe whose run is in runs/<its name>.
        output: a .safetensors file; one that is there is replaced once the new one is whole.
        checkpoint: one of the run's checkpoints, by default the newest.

    Returns:
        The file.

    Raises:
        UserError: there is no run or no such checkpoint, it is damaged, or the file cannot be written.
    """
    output = Path(output)
    if output.suffix != weights.EXPORTED:
        raise UserError(f"output {output}: the name must end in {weights.EXPORTED}")
    table.check_place("output", output)
    path = _find(Path(run), None if checkpoint is None else Path(checkpoint))
    directory = runs.of_checkpoint(path)
    text, saved = recipe.dumps(recipe.load_saved(directory)), weights.read(path)
    tensors, step = _weights(path, saved), int(saved["global_step"])
    metadata = {
        "format": "pt",
        "recipe": text,
        "step": str(step),
        "longnet_kit": longnet_kit.__version__,
    }
    metadata[weights.DIGEST] = weights.digest(tensors, metadata)
    _write(tensors, metadata, output)
    size = table.size(output.stat().st_size)
    terminal.say(f"exported step {step} of {directory} to {output}: {len(tensors)} tensors, {size}")
    return output


def _find(run: Path, checkpoint: Path | None) -> Path:
    """The checkpoint that is meant."""
    if run.suffix == ".ckpt":
        raise UserError(f"{run} is a checkpoint; give the run that it is of, and --checkpoint {run}")
    if not os.path.isdir(run):  # False for a name that no folder can have
        run = runs.ROOT / recipe.load(run).name
    if checkpoint is None:
        return runs.newest(run)
    runs.find(run, lambda _: None)
    own = [run] if (run / runs.RECIPE).is_file() else runs.versions(run.name, run.parent)
    there = [path for directory in own for path in runs.checkpoints(directory)]
    for path in there:
        if path.resolve() == checkpoint.resolve():
            return path
    hint = typed.suggestion(str(checkpoint), map(str, there))
    raise UserError(f"--checkpoint {checkpoint}: it is no checkpoint of {run}; {hint}")


def _weights(path: Path, saved: dict[str, Any]) -> dict[str, Tensor]:
    """The network's tensors, each in memory of its own."""
    tensors = {k.removeprefix("model."): x for k, x in saved["state_dict"].items() if k.startswith("model.")}
    if not tensors or "global_step" not in saved:
        raise UserError(f"{path} is no checkpoint that a run wrote: it holds no weights of a model, or not their step")
    other = [name for name, x in tensors.items() if not isinstance(x, Tensor)]
    if other:
        raise UserError(f"{path} holds something that is no tensor in {', '.join(other)}; such a file cannot hold it")
    owners: dict[int, str] = {}
    for name, x in tensors.items():
        is_first = owners.setdefault(x.untyped_storage().data_ptr(), name) == name
        tensors[name] = x.contiguous() if is_first else x.clone(memory_format=torch.contiguous_format)
    return tensors


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], output: Path) -> None:
    try:
        with durable.replacing(output) as staged:
            staged.touch()
            mode = staged.stat().st_mode  # of a new file; save_file makes one that only its owner may read
            save_file(tensors, staged, metadata)
            staged.chmod(mode)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"output {output}: cannot be written ({reason}); name a file in a folder that can be"
        ) from error
