"""A network's weights, and nothing else, out of a run or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from longnet_kit import runs


def load(network: nn.Module, source: Path) -> None:
    """Load a network's weights, and nothing else, from a run directory or a checkpoint.

    Raises:
        ValueError: nothing is there, or the first parameters that do not fit are named.
    """
    path = source if source.is_file() else runs.checkpoint(runs.find(source))
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    except Exception as error:  # a broken file can fail in any way that unpickling can
        raise ValueError(f"{path} is not a checkpoint of this kit ({error})") from error
    weights = {key.removeprefix("model."): value for key, value in saved.items() if key.startswith("model.")}
    own = network.state_dict()
    misfits = [
        f"{key} is {tuple(weights[key].shape)} there and {tuple(own[key].shape)} here"
        if key in weights and key in own
        else f"{key} is only {'there' if key in weights else 'here'}"
        for key in dict.fromkeys((*own, *weights))
        if key not in weights or key not in own or weights[key].shape != own[key].shape
    ]
    if misfits:
        more = f"; and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise ValueError(f"the weights in {path} do not fit this model: {'; '.join(misfits[:3])}{more}")
    network.load_state_dict(weights)
