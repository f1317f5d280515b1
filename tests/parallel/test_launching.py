"""Runs of several processes from the command line, however they are started; they agree on one run directory."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longnet_kit import checkpoint_io, placement, recipe
from longnet_kit.errors import UserError
from tests.parallel import desk, ranks

pytestmark = pytest.mark.timeout(600)
ALONE = ["trainer.devices=1", "strategy.name=auto", "strategy.sequence_parallel_size=1"]
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


@pytest.mark.soak
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


@pytest.mark.soak
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


def by_hand(
    folder: Path | Sequence[Path],
    own: list[list[str]],
    kind: str = "plain",
    verb: Sequence[str] = ("fit", "tiny.yaml"),
    **more: str,
) -> list[tuple[int, str]]:
    """Exit code and output of each rank, all started with arguments, variables and perhaps folders of their own."""
    folders = [folder] * len(own) if isinstance(folder, Path) else folder
    shared = desk.environment(**{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port()), **more})
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "longnet_kit.cli", *verb, *arguments], cwd=folders[rank], text=True,
            env=shared | variables_of(kind, rank), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank, arguments in enumerate(own)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=100)[0] for process in started]
        return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]
    finally:
        for process in started:
            process.kill()


def variables_of(kind: str, rank: int) -> dict[str, str]:
    """The variables of one of two ranks."""
    if kind == "plain":
        return {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    if kind == "torchrun":
        return {
            "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2",
            "TORCHELASTIC_RUN_ID": "job",
        }  # fmt: skip
    return {
        "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "20000", "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": "2",
    }  # fmt: skip


SLOW = pytest.mark.soak
OTHER_EXAMPLES = ["task=in_context", "data.source=passkey", "data.seq_len=64", "data.distances=[32]", "data.keys=1"]
OTHER_EXAMPLES += ["data.batch_size=2", "data.eval_contexts=[]"]


@pytest.mark.parametrize(
    ("kind", "strategy", "both", "second", "named"),
    [
        (
            "plain", "auto", [], ["optimizer.lr=0.5", "trainer.max_steps=9", "checkpoint.every_n_steps=5"],
            ["optimizer.lr is 0.5 on rank 1 and 0.01 on rank 0", "trainer.max_steps is 9 on rank 1 and 6 on rank 0",
             "checkpoint.every_n_steps is 5 on rank 1 and 2 on rank 0"],
        ),
        ("slurm", "fsdp", [], ["data.paths=[other.txt]"], ["paths: ['other.txt']", "paths: ['text.txt']"]),
        pytest.param("torchrun", "ddp", [], ["seed=3"], ["seed is 3 on rank 1 and 1234 on rank 0"], marks=SLOW),
        pytest.param(
            "torchrun", "sequence_parallel", [], ["data.paths=[short.txt]"],
            ["data.seq_len 32 needs at least 33 tokens"], marks=SLOW,
        ),
        pytest.param(
            "plain", "ddp", OTHER_EXAMPLES, ["data.examples_seed=7"], ["examples_seed: 7", "examples_seed: 0"],
            marks=SLOW,
        ),
        pytest.param(
            "torchrun", "fsdp", ["init_from=one.safetensors"], ["init_from=two.safetensors"],
            ["the digest of init_from's weights is"], marks=SLOW,
        ),
    ],
)  # fmt: skip
def test_ranks_that_disagree_end_before_the_first_step_and_name_both_values(
    kind: str, strategy: str, both: list[str], second: list[str], named: list[str], folder: Path
) -> None:
    (folder / "other.txt").write_text((folder / "text.txt").read_text().replace("return", "yield"))
    (folder / "short.txt").write_text("short")
    if "init_from=one.safetensors" in both:
        for name in ("one", "two"):
            desk.longnet(folder, "fit", "tiny.yaml", f"name={name}", "seed=" + str(len(name) + ord(name[0])), *ALONE)
            desk.longnet(folder, "export", f"runs/{name}", f"{name}.safetensors")
        (folder / "runs").rename(folder / "before")
    shared = [f"strategy.name={strategy}", *both]
    size = [] if strategy == "sequence_parallel" else ["strategy.sequence_parallel_size=1"]
    for code, output in by_hand(folder, [[*shared, *size], [*shared, *size, *second]], kind):
        assert code == 2 and "Traceback" not in output, output
        assert all(words in output for words in named), output
        assert "step 2/6" not in output and "another rank died" not in output
    assert not (folder / "runs").exists()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("kind", "second", "named"),
    [
        ("torchrun", ["optimizer.lr=abc"], "optimizer.lr"),
        ("slurm", ["optimizer.lr=abc"], "optimizer.lr"),
        ("plain", ["optimizer.lr=abc"], "optimizer.lr"),
        ("torchrun", ALONE, "trainer.devices"),
    ],
)
def test_a_rank_that_refuses_its_recipe_ends_those_that_wait_for_it(
    kind: str, second: list[str], named: str, folder: Path
) -> None:
    for code, output in by_hand(folder, [["strategy.timeout=90"], second], kind):
        assert code == 2 and named in output and "another rank died" not in output, output
    assert not (folder / "runs").exists()


@pytest.mark.soak
@pytest.mark.parametrize("verb", [["fit", "tiny.yaml", "resume=auto"], ["validate", "runs/tiny"]])
def test_ranks_with_different_checkpoints_of_one_name_end(verb: list[str], folder: Path, tmp_path: Path) -> None:
    desk.longnet(folder, "fit", "tiny.yaml", "trainer.max_steps=4", *ALONE)
    other = tmp_path / "other"
    shutil.copytree(folder, other, symlinks=True)
    newest = other / "runs/tiny/version_0/checkpoints/step_00000004.ckpt"
    content = torch.load(newest, weights_only=True)
    next(iter(content["state_dict"].values())).add_(1)
    checkpoint_io.write(content, newest)
    more = ["trainer.devices=2", "strategy.name=ddp", "strategy.sequence_parallel_size=1"]
    for code, output in by_hand([folder, other], [more, more], "torchrun", verb=verb):
        assert code == 2 and "the SHA-256 of step_00000004.ckpt is" in output, output
        assert "on rank 1 and" in output and "step 6/6" not in output and "another rank died" not in output


@pytest.mark.soak
def test_ranks_may_read_copies_of_one_text_by_different_paths(folder: Path) -> None:
    (folder / "copy.txt").write_text((folder / "text.txt").read_text())
    ended = by_hand(folder, [["description=first"], ["data.paths=[copy.txt]", "data.num_workers=1"]], "torchrun")
    assert [code for code, _ in ended] == [0, 0], ended


@pytest.mark.soak
def test_ranks_that_disagree_on_what_to_validate_end(folder: Path) -> None:
    desk.longnet(folder, "fit", "tiny.yaml", "trainer.devices=1", "strategy.name=auto")
    more = ["trainer.devices=2", "strategy.name=ddp", "strategy.sequence_parallel_size=1"]
    own = [more, [*more, "data.eval_contexts=[7]"]]
    for code, output in by_hand(folder, own, "torchrun", verb=["validate", "runs/tiny"]):
        assert code == 2 and "data.eval_contexts is [7] on rank 1 and [6, 16] on rank 0" in output, output


@pytest.mark.parametrize(
    "variables",
    [
        {"LOCAL_RANK": "1"},
        {"LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "1"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "job"},
    ],
)
def test_a_rank_of_more_processes_than_its_recipe_has_is_refused(
    variables: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be a run of its own."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"trainer.devices: the recipe is for 1 devices .* has (2|more) processes"):
        placement.check_world(recipe.load(folder / "tiny.yaml", ALONE))


def test_a_port_that_is_taken_is_named(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        first = desk.environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port) | variables_of("plain", 0)
        ended = subprocess.run(
            [sys.executable, *COMMAND], cwd=folder, env=first, capture_output=True, text=True, timeout=100
        )
    assert ended.returncode == 2, ended.stderr
    assert f"longnet: port {port} is in use by another process of this machine; set the environment" in ended.stderr
    assert "Traceback" not in ended.stderr
