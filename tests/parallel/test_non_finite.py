"""A value that is not finite on one rank stops all, before the update."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from longnet_kit import runs
from tests.parallel import desk

PLANT = """
import os
import torch
from longnet_kit.model.blocks import Block
forward, calls = Block.forward, [0]
def planted(self, *args, **kwargs):
    out = forward(self, *args, **kwargs)
    calls[0] += self.training
    return out * float("nan") if calls[0] == 2 * 3 and os.environ.get("LOCAL_RANK") == "1" else out
Block.forward = planted
"""


ALONE = """
import os
from longnet_kit.tasks import LanguageModeling
step = LanguageModeling.training_step
def planted(self, batch, batch_idx):
    wrong = os.environ.get("LOCAL_RANK") == "1" and self.trainer.global_step == 2
    return step(self, batch, batch_idx) + (float("nan") if wrong else 0)
LanguageModeling.training_step = planted
"""
"""A constant, which has no gradient: only one rank sees it."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["sequence_parallel", "sequence_parallel_fsdp"])
def test_an_update_is_left_out_on_all_ranks_where_one_alone_sees_why(strategy: str, tmp_path: Path) -> None:
    desk.lay(tmp_path)
    (tmp_path / "plant.py").write_text(ALONE)
    overrides = ["imports=[plant]", f"strategy.name={strategy}", "checkpoint.every_n_steps=1", "checkpoint.keep=9"]
    told = desk.longnet(tmp_path, "fit", "tiny.yaml", *overrides, "optimizer.max_skipped_steps=1")
    assert "step 3: the loss is nan, but every layer's output is finite (" in told and "1 of at most 1" in told
    saved = [torch.load(x, weights_only=True)["state_dict"] for x in runs.checkpoints(tmp_path / "runs/tiny/version_0")]
    changed = [any(not torch.equal(new[k], old[k]) for k in new) for old, new in pairwise(saved)]
    assert changed == [True, False, True, True, True]
    assert all(bool(x.isfinite().all()) for weights in saved for x in weights.values())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["sequence_parallel", "sequence_parallel_fsdp"])
def test_all_ranks_stop_before_the_update_and_name_what_one_has_found(strategy: str, tmp_path: Path) -> None:
    desk.lay(tmp_path)
    (tmp_path / "plant.py").write_text(PLANT)
    told = desk.longnet(tmp_path, "fit", "tiny.yaml", "imports=[plant]", f"strategy.name={strategy}", expect=1)
    # Planted in the third step alone, so that the repeated pass is sound, and the loss is what is left.
    assert (
        "longnet: step 3: the loss is nan, but every layer's output is finite when the step is repeated" in told
        and "(samples " in told
    ), told
    assert "Traceback" not in told and "another rank died" not in told
    run = tmp_path / "runs/tiny/version_0"
    saved = torch.load(runs.checkpoint(run), weights_only=True)
    assert saved["global_step"] == 2
    assert all(bool(x.isfinite().all()) for x in saved["state_dict"].values())
