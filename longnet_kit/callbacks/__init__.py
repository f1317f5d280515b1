"""What watches a run: throughput, loss by position, the progress bar, the last values, the final validation."""

from __future__ import annotations

from longnet_kit.callbacks.final_validation import FinalValidation
from longnet_kit.callbacks.hyper_parameters import log_hyper_parameters
from longnet_kit.callbacks.last_values import LastValues
from longnet_kit.callbacks.loss_by_position import LossByPosition
from longnet_kit.callbacks.progress import Bar, Lines, progress_bar
from longnet_kit.callbacks.throughput import Throughput

__all__ = [
    "Bar",
    "FinalValidation",
    "LastValues",
    "Lines",
    "LossByPosition",
    "Throughput",
    "log_hyper_parameters",
    "progress_bar",
]
