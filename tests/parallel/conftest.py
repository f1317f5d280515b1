"""Trainings on one process and on several, each run once for all workers of a test run."""

from __future__ import annotations

import shutil
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


CPU = [("2", "cpu"), pytest.param(("4", "cpu"), marks=pytest.mark.soak), ("2x2", "cpu")]
CUDA = [pytest.param((layout, "cuda"), marks=pytest.mark.gpu) for layout in ("2", "4", "2x2")]


@pytest.fixture(scope="session", params=[*CPU, *CUDA], ids="-".join)
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A layout and the accelerator that it runs on."""
    layout, accelerator = request.param
    needed = scenarios.LAYOUTS[layout][0] * scenarios.LAYOUTS[layout][1]
    if accelerator == "cuda" and torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} CUDA devices, since NCCL takes one rank on each")
    return layout, accelerator


@pytest.fixture(scope="session")
def layout(place: tuple[str, str]) -> str:
    return place[0]


@pytest.fixture(scope="session")
def written(place: tuple[str, str], shared_folder: Path) -> Path:
    """The folder of a layout's outcomes and checkpoints."""
    folder = shared_folder / "-".join(place)
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def on_many(
    place: tuple[str, str], written: Path, shared_folder: Path, on_one: dict[str, scenarios.Outcome]
) -> dict[tuple[str, str], Any]:
    """By strategy and scenario, what came out of a layout's training."""
    layout, accelerator = place
    with FileLock(shared_folder / f"{written.name}.lock"):
        file = written / f"{layout}.pt"
        if not file.exists():
            shutil.copy(shared_folder / "1.ckpt", written)
            data, sequence = scenarios.LAYOUTS[layout]
            ranks.finish(ranks.start(data * sequence, "tests.parallel.job", str(written), layout, accelerator))
        return torch.load(file, weights_only=False)
