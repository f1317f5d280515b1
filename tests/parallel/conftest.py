"""Trainings on one process and on several, each run once for all workers of a test run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.parallel import ranks, scenarios


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that is the same for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "trainings"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def on_one(shared_folder: Path) -> dict[str, scenarios.Outcome]:
    """Every scenario on one process, and a checkpoint of `adam` for others to go on from."""
    with FileLock(shared_folder / "1.lock"):
        file = shared_folder / "1.pt"
        if not file.exists():
            found = {name: scenarios.train(shared_folder, "1", "auto", **s) for name, s in scenarios.SCENARIOS.items()}
            scenarios.train(
                shared_folder, "1", "auto", optimizer="adam", max_steps=scenarios.SAVED_AT,
                save_to=shared_folder / "1.ckpt",
            )  # fmt: skip
            torch.save(found, file)
        return torch.load(file, weights_only=False)


@pytest.fixture(scope="session", params=["2", "4", "2x2"])
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def on_many(layout: str, shared_folder: Path, on_one: dict[str, scenarios.Outcome]) -> dict[tuple[str, str], Any]:
    """By strategy and scenario, what came out of a layout's training."""
    with FileLock(shared_folder / f"{layout}.lock"):
        file = shared_folder / f"{layout}.pt"
        if not file.exists():
            data, sequence = scenarios.LAYOUTS[layout]
            ranks.finish(ranks.start(data * sequence, "tests.parallel.job", str(shared_folder), layout))
        return torch.load(file, weights_only=False)
