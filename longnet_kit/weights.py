"""A network's weights, and nothing else, out of a run, a checkpoint or an exported file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from longnet_kit import checkpoint_io, durable, runs, terminal
from longnet_kit.errors import UserError
from longnet_kit.model import image_weights, slide_weights, torchscale

EXPORTED = ".safetensors"
"""What the name of an exported file ends in."""
DIGEST = "sha256"
"""The key of an exported file's metadata that holds the checksum of its tensors and of the other metadata."""
_RESUMED = {"global_step": int, "loops": dict, "lr_schedulers": list, "optimizer_states": list}
"""What a training goes on from, beside the weights."""
_ELSEWHERE = (
    (torchscale.is_decoder, torchscale.convert),
    (slide_weights.is_slide_encoder, slide_weights.convert),
    (image_weights.is_longvit, image_weights.convert),
)
"""Layouts of other projects: what tells one, and what makes a network's weights of it."""
_SAVED_UNDER = ("model", "module", "teacher")
"""Where torchscale's users, DeepSpeed and DINO have the state dictionary in what they save."""


class _LeftOut:
    """What stands in the place of something in a file that is no weight: nothing of it is made."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


_BESIDE = ("argparse.Namespace", "numpy.dtype", *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")))
"""What such files hold beside the weights, arguments and learning rates, and torch would refuse; by its name there."""
_READING = Lock()
"""Held while torch is told of `_BESIDE`, which it is as a whole."""


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, its tensors still in the file; of an exported file, its weights in the same layout.

    Raises:
        UserError: it is no such file, or is damaged, or cannot be read now.
    """
    is_exported = path.suffix == EXPORTED
    if _is_text(path):
        what = "a recipe, or another text file" if path.suffix in (".yaml", ".yml") else "a text file"
        raise UserError(
            f"{path} is {what}, and holds no weights; expected a run directory, a checkpoint (.ckpt) or an exported "
            f"file ({EXPORTED})"
        )
    if not is_exported and (wrong := checkpoint_io.damage(path)):
        raise UserError(f"{path} is damaged or no checkpoint ({wrong}); give another one, or delete it")
    try:
        saved = _read_exported(path) if is_exported else _read_checkpoint(path)
    except Exception as error:  # a broken file can fail in any way that unpickling can
        kind = "safetensors file" if is_exported else "checkpoint of this kit"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is not a {kind}, or it is damaged ({reason}); give another one, or delete it"
        ) from error
    return saved


def _is_text(path: Path) -> bool:
    try:
        with durable.opened(path) as file:
            start = file.read(1024)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give another one") from error
    return bool(start) and not any(byte < 32 and byte not in b"\t\n\f\r" for byte in start)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    with _READING, torch.serialization.safe_globals([(_LeftOut, name) for name in _BESIDE]):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(saved, Mapping):
        raise UserError("it holds no state_dict")
    for state in (saved, *(saved.get(key) for key in _SAVED_UNDER)):
        if isinstance(state, Mapping) and any(is_layout(state) for is_layout, _ in _ELSEWHERE):
            return {"state_dict": state}
    if not isinstance(saved.get("state_dict"), Mapping):
        raise UserError("it holds no state_dict")
    return dict(saved)


def _read_exported(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        metadata = file.metadata() or {}
    expected = metadata.pop(DIGEST, None)
    if expected is not None and expected != digest(tensors, metadata):
        raise UserError(
            f"its content is not what the {DIGEST} in its metadata was written for; if you changed it, save it without "
            "that key"
        )
    return {"state_dict": {f"model.{name}": x for name, x in tensors.items()}}


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """SHA-256 of tensors, with their names, dtypes and shapes, and of a file's other metadata."""
    found = hashlib.sha256(json.dumps(dict(sorted((metadata or {}).items()))).encode())
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        content: Any = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found.update(content)
    return found.hexdigest()


def load(network: nn.Module, source: Path) -> None:
    """Load a network's weights, and nothing else, from a run directory, a checkpoint or an exported file.

    A file with the state dictionary of a torchscale decoder is taken too, see `longnet_kit.model.torchscale`, of a
    slide encoder, see `longnet_kit.model.slide_weights`, and of a LongViT, see `longnet_kit.model.image_weights`.

    Raises:
        UserError: nothing is there, or the first parameters that do not fit are named.
    """
    path = _file_of(source)
    network.load_state_dict(fitting(network, path, read(path)))


def start_from(network: nn.Module, source: Path, say: runs.Say = terminal.tell) -> str:
    """Load weights as `load` does, to be trained on; a head that there is none for stays as it was drawn.

    The parameters of that head are what the network's `own_head` names: a classifier starts from a language model so.
    Which checkpoint of a run it is goes to `say`.

    Returns:
        A sentence on what was not loaded; empty where all was.
    """
    path = _file_of(source, say)
    own_head = getattr(network, "own_head", ())
    drawn = {key: x for key, x in network.state_dict().items() if key in own_head}
    loaded = fitting(network, path, read(path), instead=drawn)
    network.load_state_dict(loaded)
    if drawn and all(loaded[key] is x for key, x in drawn.items()):
        return f"{path} has no {', '.join(drawn)}: drawn anew, the rest is loaded"
    return ""


def _file_of(source: Path, say: runs.Say = terminal.tell) -> Path:
    return source if runs.is_file(source) else runs.newest(source, say)


def check_resumable(network: nn.Module, path: Path) -> int:
    """The step of a checkpoint that a training of this network can go on from.

    Raises:
        UserError: it is no checkpoint, or not of such a network, or holds weights alone.
    """
    saved = read(path)
    missing = [key for key, kind in _RESUMED.items() if type(saved.get(key)) is not kind]
    if missing:
        raise UserError(
            f"resume: {path} holds no {', '.join(missing)}, so training cannot go on from it; "
            "to start from its weights, use init_from"
        )
    fitting(network, path, saved)
    return saved["global_step"]


def fitting(
    network: nn.Module, path: Path, saved: Mapping[str, Any], instead: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The weights of the network in what `read` found; UserError when they are those of another one.

    Args:
        instead: what to take for parameters of which none is there.
    """
    state = {key: x for key, x in saved["state_dict"].items() if isinstance(key, str)}
    convert = next((convert for is_layout, convert in _ELSEWHERE if is_layout(state)), None)
    if convert is None:
        weights = {key.removeprefix("model."): x for key, x in state.items() if key.startswith("model.")}
    else:
        try:
            weights = convert(state, network)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    if instead and not any(key in weights for key in instead):
        weights |= instead
    own = network.state_dict()
    keys = dict.fromkeys((*own, *weights))
    misfits = [misfit for key in keys if (misfit := _misfit(key, weights.get(key), own.get(key)))]
    if misfits:
        more = f"; and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise UserError(f"the weights in {path} do not fit this model: {'; '.join(misfits[:3])}{more}")
    return weights


def _misfit(key: str, there: Any, here: Tensor | None) -> str:
    """Why a value cannot be copied into a tensor of the network; empty where it can."""
    if here is None or there is None:
        return f"{key} is only {'here' if there is None else 'there'}"
    plain = isinstance(there, Tensor) and not there.is_nested and not there.is_quantized
    if not plain or there.layout is not torch.strided or there.device.type != "cpu":
        return f"{key} is no plain tensor there"
    if there.shape != here.shape:
        return f"{key} is {tuple(there.shape)} there and {tuple(here.shape)} here"
    if there.is_floating_point() != here.is_floating_point() or there.is_complex():
        return f"{key} holds {there.dtype} there and {here.dtype} here"
    return ""
