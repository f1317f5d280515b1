"""Conformance checks that hold an attention backend, plug-ins included, to what the kit expects of one.

`check_backend` raises on the first look; `run_checks` reports. Where the backend has a pattern it is compared, values
and gradients in the widest dtype that it supports (float64, as a rule), with the softmax over that pattern's multiset
of keys; with one softmax for each branch, mixed, where it has weights of its own for branches. Where it has no pattern,
only what needs none is checked, and the report says so.
"""

from __future__ import annotations

from longnet_kit.testing.conformance import Check, ConformanceError, check_backend, main_check, run_checks
from longnet_kit.testing.multiset import mixed_reference, reference
from longnet_kit.testing.subject import HEAD_DIMS, SEQ_LENS, WITHIN

__all__ = [
    "HEAD_DIMS",
    "SEQ_LENS",
    "WITHIN",
    "Check",
    "ConformanceError",
    "check_backend",
    "main_check",
    "mixed_reference",
    "reference",
    "run_checks",
]
