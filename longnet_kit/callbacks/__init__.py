"""What watches a run: throughput, consumption, figures, the progress bar, the last values, the final validation, the
kernels; and what keeps it from being lost: saving, random generators, the check for values that are not finite."""

from __future__ import annotations

from longnet_kit.callbacks.attention_figures import AttentionPattern, BranchWeights
from longnet_kit.callbacks.board import Board
from longnet_kit.callbacks.consumption import Consumption, points
from longnet_kit.callbacks.fast_kernels import FastKernels
from longnet_kit.callbacks.final_validation import FinalValidation
from longnet_kit.callbacks.generators import Generators
from longnet_kit.callbacks.last_values import LastValues
from longnet_kit.callbacks.metrics_table import MetricsTable
from longnet_kit.callbacks.non_finite import NonFinite, NonFiniteError
from longnet_kit.callbacks.profile import Profile
from longnet_kit.callbacks.progress import Bar, Lines, progress_bar
from longnet_kit.callbacks.saving import MONITORED, SaveError, Saving
from longnet_kit.callbacks.throughput import Throughput
from longnet_kit.callbacks.validation_figures import Confusion, LossByPosition, PerplexityByContext

__all__ = [
    "MONITORED",
    "AttentionPattern",
    "Bar",
    "Board",
    "BranchWeights",
    "Confusion",
    "Consumption",
    "FastKernels",
    "FinalValidation",
    "Generators",
    "LastValues",
    "Lines",
    "LossByPosition",
    "MetricsTable",
    "NonFinite",
    "NonFiniteError",
    "PerplexityByContext",
    "Profile",
    "SaveError",
    "Saving",
    "Throughput",
    "points",
    "progress_bar",
]
