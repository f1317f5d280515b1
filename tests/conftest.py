"""Shared by all tests: threads, hypothesis settings, the markers `gpu` and `soak`, and a temporary token cache."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported, and inherited by the processes that tests start. The workers of one machine share its cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Read where triton is imported: without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run. `--hypothesis-profile random` looks for new ones, `deep` for many.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("deep", settings.get_profile("random"), max_examples=10_000)
settings.load_profile("repeatable")

CACHE = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--soak`."""
    parser.addoption("--soak", action="store_true", help="run the tests marked `soak`, and no others")


def pytest_configure(config: pytest.Config) -> None:
    """Point the token cache at a new folder, one for all workers of the run: they inherit the environment."""
    if not hasattr(config, "workerinput"):
        config.stash[CACHE] = os.environ["LONGNET_CACHE"] = tempfile.mkdtemp(prefix="longnet_kit_tests_")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the token cache of this run."""
    if CACHE in config.stash:
        shutil.rmtree(config.stash[CACHE], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select the tests marked `soak`, or all others; skip those marked `gpu` where there is no CUDA device."""
    named = any("::" in argument for argument in config.args)  # a test that is named runs whatever its marks are
    if not named:
        wanted = config.getoption("--soak")
        left_out = [item for item in items if (item.get_closest_marker("soak") is not None) != wanted]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
