"""Hyper-parameters and the environment of a run, in TensorBoard."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from longnet_kit import __version__

METRICS = ("val/loss", "val/perplexity", "val/bits_per_byte", "train/loss", "train/tokens_per_second")
"""The columns of results in the HPARAMS tab."""


def log_hyper_parameters(logger: TensorBoardLogger, values: Mapping[str, Any]) -> None:
    """Fill the HPARAMS tab and the text `environment`; call it on one rank.

    Args:
        values: nested hyper-parameters; they show up under dotted names, lists as text.
    """
    from torch.utils.tensorboard.summary import hparams

    # The logger's own log_hyperparams would start each metric's curve with a made-up point.
    summaries = hparams(flatten(values), dict.fromkeys(METRICS, 0.0))
    for summary in summaries:
        logger.experiment.file_writer.add_summary(summary)
    logger.experiment.add_text("environment", environment(), global_step=0)
    logger.experiment.flush()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested mappings as one, under dotted names; whatever is no number, truth value or text becomes text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        elif isinstance(value, (bool, int, float, str)):
            flat[name] = value
        elif isinstance(value, Sequence):
            flat[name] = ", ".join(map(str, value))
        else:
            flat[name] = str(value)
    return flat


def environment() -> str:
    """What the run ran on, as a Markdown table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    rows = {
        "longnet_kit": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "CUDA": torch.version.cuda or "none",
        "device": device,
        "CPU threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
