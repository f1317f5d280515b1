"""One rank of several that run all scenarios: `python -m tests.parallel.job FOLDER LAYOUT ACCELERATOR`.

Lightning reads the rank from the environment. Rank 0 writes what came out into the folder.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from longnet_kit.parallel import SequenceParallelStrategy
from longnet_kit.parallel.strategies import SequenceParallel
from tests.parallel import scenarios
from tests.parallel.scenarios import LAYOUTS, MUTATIONS, SAVED_AT, SCENARIOS, STRATEGIES


def main(folder: Path, layout: str, accelerator: str) -> None:
    """Run everything on this rank."""
    torch.set_num_threads(1)
    train = partial(scenarios.train, accelerator=accelerator)
    size = LAYOUTS[layout][1]
    found: dict[tuple[str, str], Any] = {}
    for name, kind in STRATEGIES.items():
        for scenario, settings in SCENARIOS.items():
            found[name, scenario] = train(folder, layout, kind(size), **settings)
        for mutation, patch in MUTATIONS.items():
            with patch():
                found[name, mutation] = train(folder, layout, kind(size))
        found[name, "resumed"] = train(folder, layout, kind(size), optimizer="adam", ckpt_path=folder / "1.ckpt")
        saved = folder / f"{layout}_{name}.ckpt"
        train(folder, layout, kind(size), optimizer="adam", max_steps=SAVED_AT, save_to=saved)
    for name, other in (("ddp", "fsdp"), ("fsdp", "ddp")):
        ckpt = folder / f"{layout}_{other}.ckpt"
        found[name, "resumed from the other"] = train(
            folder, layout, STRATEGIES[name](size), optimizer="adam", ckpt_path=ckpt
        )
    found["ddp", "sampled by world rank"] = sampled_by_world_rank(folder, layout, accelerator)
    if os.environ["LOCAL_RANK"] == "0":
        torch.save(found, folder / f"{layout}.pt")


def sampled_by_world_rank(folder: Path, layout: str, accelerator: str) -> str:
    """What a run says whose sampler gives each rank samples of its own."""
    world = LAYOUTS[layout][0] * LAYOUTS[layout][1]
    own = property(lambda self: {"num_replicas": world, "rank": self.global_rank})
    with mock.patch.object(SequenceParallel, "distributed_sampler_kwargs", own):
        try:
            scenarios.train(folder, layout, SequenceParallelStrategy(LAYOUTS[layout][1]), accelerator=accelerator)
        except ValueError as error:
            return str(error)
    return ""


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
