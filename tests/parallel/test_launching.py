"""Runs of several processes from the command line, however they are started; they agree on one run directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.parallel import desk, ranks

pytestmark = pytest.mark.timeout(600)
COMMAND = ["-m", "longnet_kit.cli", "fit", "tiny.yaml"]
NOTING = """
import functools, json
import numpy as np
from longnet_kit.report import figures

def noted(name):
    draw = getattr(figures, name)

    @functools.wraps(draw)
    def drawn(*arguments, **options):
        numbers = [np.asarray(list(x.items()) if isinstance(x, dict) else x).tolist() for x in arguments]
        with open("drawn.jsonl", "a") as file:
            file.write(json.dumps([name, numbers, options]) + "\\n")
        return draw(*arguments, **options)

    setattr(figures, name, drawn)

for name in ("loss_by_position", "perplexity_by_context", "branch_weights"):
    noted(name)
"""
"""A module that writes down the numbers of every figure that a run draws from results."""


@pytest.fixture(scope="module")
def alone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run was trained on one process."""
    folder = tmp_path_factory.mktemp("alone")
    desk.lay(folder)
    (folder / "noting.py").write_text(NOTING)
    desk.longnet(folder, "fit", "tiny.yaml", "imports=[noting]", "trainer.devices=1", "strategy.name=auto")
    return folder


@pytest.fixture(scope="module")
def alone(alone_folder: Path) -> dict[str, float]:
    """The summary of the run on one process."""
    return desk.summary(alone_folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    desk.lay(tmp_path)
    return tmp_path


def assert_one_run(folder: Path, alone: dict[str, float], name: str = "tiny") -> None:
    """One run directory, with the numbers of the run on one process."""
    assert [d.name for d in (folder / "runs" / name).iterdir()] == ["version_0"]
    found = desk.summary(folder, f"runs/{name}/version_0")
    assert found["status"] == "finished"
    assert found["train/tokens"] == alone["train/tokens"]
    same = {tag for tag in alone if tag.startswith(("train/loss", "train/grad", "train/lr", "val/"))}
    assert {tag: found[tag] for tag in same} == pytest.approx({tag: alone[tag] for tag in same}, rel=1e-4)


def drawn(folder: Path) -> list[tuple[str, np.ndarray, Any]]:
    """The name, numbers and options of each figure that the run drew from its results, in order."""
    lines = [json.loads(line) for line in (folder / "drawn.jsonl").read_text().splitlines()]
    return [(name, np.concatenate([np.ravel(x) for x in numbers]), options) for name, numbers, options in lines]


def pictures(folder: Path) -> dict[str, list[bytes]]:
    """The pictures in TensorBoard by tag."""
    events = EventAccumulator(str(folder / "runs/tiny/version_0"), size_guidance={"images": 0}).Reload()
    return {tag: [x.encoded_image_string for x in events.Images(tag)] for tag in events.Tags()["images"]}


def together(commands: list[list[str]], folder: Path, environments: list[dict[str, str]]) -> list[str]:
    """Run commands at once; their outputs."""
    return ranks.finish(
        [
            subprocess.Popen(
                command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for command, environment in zip(commands, environments, strict=True)
        ]
    )


@pytest.mark.parametrize("strategy", ["sequence_parallel", "sequence_parallel_fsdp"])
def test_the_command_starts_its_processes(
    strategy: str, folder: Path, alone: dict[str, float], alone_folder: Path
) -> None:
    name = f"strategy.name={strategy}"
    (folder / "noting.py").write_text(NOTING)
    out = desk.longnet(folder, "fit", "tiny.yaml", "imports=[noting]", name, "strategy.sequence_parallel_size=2")
    assert out.count("finished  runs/tiny/version_0: 6 steps") == 1
    assert out.count("tiny: 6 steps into") == 1
    assert_one_run(folder, alone)
    shown, expected = pictures(folder), pictures(alone_folder)
    assert {tag: len(images) for tag, images in shown.items()} == {tag: len(images) for tag, images in expected.items()}
    assert shown["attention_pattern"] == expected["attention_pattern"]  # of the pattern alone, so equal to the bit
    assert {"loss_by_position", "perplexity_by_context", "branch_weights"} == {name for name, *_ in drawn(folder)}
    for (figure, numbers, options), (known, right, others) in zip(drawn(folder), drawn(alone_folder), strict=True):
        assert (figure, options) == (known, others)
        np.testing.assert_allclose(numbers, right, rtol=1e-4, err_msg=figure)
    assert desk.longnet(folder, "validate", "runs/tiny").count("val/loss ") == 1


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_data_parallel_runs_see_the_same_batches(strategy: str, folder: Path, alone: dict[str, float]) -> None:
    desk.longnet(
        folder, "fit", "tiny.yaml", f"strategy.name={strategy}", "data.batch_size=2", "trainer.limit_val_batches=4"
    )
    wider = desk.summary(folder)
    assert {t: wider[t] for t in ("train/loss", "train/grad_norm")} == pytest.approx(
        {t: alone[t] for t in ("train/loss", "train/grad_norm")}, rel=1e-4
    )


def test_a_run_goes_on_with_other_processes(folder: Path, alone: dict[str, float]) -> None:
    """Two ranks, then one, then two under FSDP, in one directory."""
    longer = ["optimizer.schedule=constant", "trainer.val_check_interval=6", "model.dropout=0.1"]
    desk.longnet(folder, "fit", "tiny.yaml", *longer, "name=whole", "trainer.devices=1", "strategy.name=auto")
    desk.longnet(folder, "fit", "tiny.yaml", *longer, "trainer.max_steps=2")
    desk.longnet(
        folder, "fit", "tiny.yaml", *longer, "trainer.max_steps=4", "resume=auto", "trainer.devices=1",
        "strategy.name=auto",
    )  # fmt: skip
    fsdp = ["strategy.name=sequence_parallel_fsdp", "strategy.sequence_parallel_size=2"]
    desk.longnet(folder, "fit", "tiny.yaml", *longer, "resume=auto", *fsdp)
    assert_one_run(folder, desk.summary(folder, "runs/whole/version_0"))
    out = desk.longnet(folder, "fit", "tiny.yaml", *longer, "resume=auto", *fsdp)
    assert out.count("has finished its 6 steps") == 1


def test_torchrun_on_one_node(folder: Path, alone: dict[str, float]) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={ranks.free_port()}",
    ]
    together([[*torchrun, *COMMAND]], folder, [desk.environment()])
    assert_one_run(folder, alone)


def test_torchrun_on_two_nodes(folder: Path, alone: dict[str, float]) -> None:
    """Both on this machine, as the README says for two: one process each, that share a sequence."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--nnodes=2"]
    torchrun += ["--master-addr=127.0.0.1", f"--master-port={ranks.free_port()}"]
    nodes = [[*torchrun, f"--node-rank={i}", *COMMAND, "trainer.devices=1", "trainer.num_nodes=2"] for i in (0, 1)]
    together(nodes, folder, [desk.environment()] * 2)
    assert_one_run(folder, alone)


def test_slurm(folder: Path, alone: dict[str, float]) -> None:
    """Two tasks on one node, with the variables that srun sets."""
    shared = {
        "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": str(20000 + ranks.free_port() % 10000),
        "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port()),
    }  # fmt: skip
    tasks = [desk.environment(**shared, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in (0, 1)]
    together([[sys.executable, *COMMAND]] * 2, folder, tasks)
    assert_one_run(folder, alone)


def test_an_error_of_the_first_rank_ends_all_and_is_told_once(folder: Path) -> None:
    """Here a recipe that differs from the run's, which only the first rank compares."""
    desk.longnet(folder, "fit", "tiny.yaml", "trainer.devices=1", "strategy.name=auto", "trainer.max_steps=2")
    out = desk.longnet(folder, "fit", "tiny.yaml", "resume=auto", "optimizer.lr=0.5", expect=2)
    assert out.count("optimizer.lr: 0.01 there, 0.5 here") == 1
    assert "Traceback" not in out


@pytest.mark.parametrize("strategy", ["ddp", "sequence_parallel"])
def test_process_groups_outlive_the_interpreter(strategy: str, folder: Path) -> None:
    """Closing them while it ends aborted 3 of 100 finished processes; by the garbage collector, it hung 40 of 50."""
    script = folder / "script.py"
    script.write_text(
        "import atexit, gc, sys, torch.distributed as dist\n"
        "from longnet_kit import experiment, recipe\n"
        "def references(): return {id(g): sys.getrefcount(g) for g in dist.distributed_c10d._world.pg_map}\n"
        "before = {}\n"
        "def are_kept(): return bool(before) and all(references()[g] > n for g, n in before.items())\n"
        "atexit.register(lambda: print('kept', are_kept(), flush=True))\n"
        f"experiment.run(recipe.load('tiny.yaml', ['strategy.name={strategy}', 'data.batch_size=2']))\n"
        "gc.collect()\n"
        "atexit.register(lambda: before.update(references()))  # just before the groups are kept\n"
    )
    out = together([[sys.executable, "script.py"]], folder, [desk.environment()])[0]
    assert out.count("kept True") == 2
