"""What a run meets on its disk: damage, leftovers, kills, files that are no checkpoints. It is told."""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
from multiprocessing import synchronize
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longnet_kit import checkpoint_io, cli, data, experiment, fitting, recipe, resume, runs
from longnet_kit.callbacks import Board, MetricsTable
from longnet_kit.data import cache, language_modeling

ROOT = Path(__file__).parents[1]
FLIPS = 50
RECIPE = """
name: tiny
model: {dim: 16, layers: 1, heads: 2, ffn_dim: 32, attention: {backend: sdpa}}
data: {source: files, paths: [text.txt], tokenizer: bytes, seq_len: 32, batch_size: 2}
trainer: {max_steps: 6, limit_val_batches: 1, num_sanity_val_steps: 0, log_every_n_steps: 1, accelerator: cpu,
          enable_progress_bar: false}
checkpoint: {every_n_steps: 2, keep: 3, keep_best: false}
"""


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGNET_CACHE", str(tmp_path / "cache"))
    words = random.Random(0)
    Path("text.txt").write_text("".join(f"f{words.randrange(99)} = {words.randrange(9)}\n" for _ in range(900)))
    Path("tiny.yaml").write_text(RECIPE)


def load(*overrides: str) -> recipe.Recipe:
    return recipe.load("tiny.yaml", list(overrides))


def flip(file: Path, places: random.Random) -> bytes:
    """Change one bit of a file; returns what it was."""
    sound = file.read_bytes()
    changed = bytearray(sound)
    changed[places.randrange(len(sound))] ^= 1 << places.randrange(8)
    put(file, bytes(changed))
    return sound


def put(file: Path, content: bytes) -> None:
    """Write a file so that its time differs, as that of a file that was changed does."""
    before = file.stat().st_mtime_ns
    file.write_bytes(content)
    os.utime(file, ns=(before + 10**6, before + 10**6))


def test_every_flipped_bit_of_a_shard_is_found_and_its_file_named() -> None:
    """Before a batch that holds it is handed out; in the manifest, when the cache is opened."""
    experiment.build_data(load()).prepare_data()
    (folder,) = (path for path in cache.directory().iterdir() if path.is_dir())
    files, places, found = sorted(folder.iterdir()), random.Random(0), 0
    assert [file.suffix for file in files] == [".json", ".bin", ".bin", ".bin"]
    for number in range(FLIPS):
        file = files[number % len(files)]
        sound = flip(file, places)
        try:
            opened = cache.TokenCache(folder)
            for split in opened.splits.values():
                split.read(0, len(split))
        except data.DataError as error:
            found += str(file) in str(error) and "delete" in str(error)
        put(file, sound)
    assert found == FLIPS
    assert len(cache.TokenCache(folder).splits) == 3


def test_every_flipped_bit_of_a_checkpoint_is_found_and_its_file_named(capsys: pytest.CaptureFixture[str]) -> None:
    run = experiment.run(load())
    places, found = random.Random(1), 0
    for number in range(FLIPS):
        file = runs.checkpoints(run)[number % 3]
        sound = flip(file, places)
        capsys.readouterr()
        code = cli.main(["fit", "tiny.yaml", "name=fork", f"resume={file}", "trainer.max_steps=20"])
        told = capsys.readouterr().err
        found += code == cli.USER_ERROR and str(file) in told and "Traceback" not in told
        put(file, sound)
    assert found == FLIPS
    assert not Path("runs/fork").exists()
    for verb in (["validate", str(run)], ["fit", "tiny.yaml", "name=tuned", f"init_from={run}"]):
        flip(runs.checkpoint(run), places)
        assert cli.main(verb) == cli.USER_ERROR
        assert str(runs.checkpoint(run)) in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bit", "cut", "empty", "no checksum"])
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_sound(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    constant = "optimizer.schedule=constant"
    whole = experiment.run(load("name=whole", "trainer.max_steps=8", constant))
    run = experiment.run(load(constant))
    newest = runs.checkpoint(run)
    content = newest.read_bytes()
    {
        "bit": lambda: flip(newest, random.Random(0)),
        "cut": lambda: put(newest, content[:-1]),
        "empty": lambda: put(newest, b""),
        "no checksum": lambda: (
            checkpoint_io.checksum_file(newest).unlink(),
            put(newest, content[: len(content) // 2]),
        ),
    }[kind]()
    capsys.readouterr()
    again = experiment.run(load("resume=auto", "trainer.max_steps=8", constant))
    told = capsys.readouterr().out
    assert again == run and f"{newest} is damaged" in told and "goes on from step_00000004.ckpt" in told
    ours, theirs = (torch.load(runs.checkpoint(x), weights_only=True) for x in (run, whole))
    assert ours["global_step"] == theirs["global_step"] == 8
    assert all(torch.equal(ours["state_dict"][name], weight) for name, weight in theirs["state_dict"].items())
    assert newest.with_name(f"{newest.name}.damaged").exists()
    assert newest.exists() and checkpoint_io.damage(newest) == ""  # it was written again


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again_by_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = experiment.run(load())
    for checkpoint in runs.checkpoints(run):
        put(checkpoint, b"")
    (run / runs.SUMMARY).unlink()  # else it has finished, and nothing is to do
    rows = (run / runs.METRICS).read_bytes()
    assert cli.main(["fit", "tiny.yaml", "resume=auto"]) == cli.USER_ERROR
    assert f"all checkpoints of {run} are damaged" in capsys.readouterr().err
    assert len(runs.checkpoints(run)) == 3 and (run / runs.METRICS).read_bytes() == rows


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = experiment.run(load())

    def failing(*_: Any) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_io, "_damage", failing)
    newest = runs.checkpoint(run)
    for given in (["resume=auto"], [f"resume={newest}", "name=fork"], [f"init_from={newest}", "name=tuned"]):
        code = cli.main(["fit", "tiny.yaml", "trainer.max_steps=9", *given])
        told = capsys.readouterr().err
        assert code == cli.USER_ERROR and f"{newest} cannot be read (Input/output error)" in told
        assert "damaged" not in told
    assert [runs.step_of(path) for path in runs.checkpoints(run)] == [2, 4, 6]


def test_links_never_point_to_a_checkpoint_that_was_set_aside() -> None:
    run = experiment.run(load())
    flip(runs.checkpoint(run), random.Random(0))
    before = runs.checkpoints(run)[-2]
    assert len(resume.set_damaged_aside(run, before)) == 1
    assert (run / runs.CHECKPOINTS / runs.LATEST).resolve().name == before.name


def test_a_run_that_has_done_more_steps_than_asked_for_is_not_called_finished() -> None:
    run = experiment.run(load())
    (run / runs.SUMMARY).unlink()
    with pytest.raises(ValueError, match=r"has done more than the 3 steps of trainer.max_steps.*at least 6"):
        experiment.run(load("resume=auto", "trainer.max_steps=3"))
    assert recipe.load_saved(run).trainer["max_steps"] == 6


def test_a_malicious_checkpoint_never_executes(capsys: pytest.CaptureFixture[str]) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (exec, ("open('executed', 'w')",))

    run = experiment.run(load())
    checkpoint = runs.checkpoint(run)
    for with_checksum in (True, False):
        content = torch.load(checkpoint, weights_only=True) if with_checksum else {}
        checkpoint_io.remove(checkpoint)
        io = checkpoint_io.StagedCheckpointIO()
        io.save_checkpoint({**content, "state_dict": Payload(), "global_step": 6}, checkpoint)
        if not with_checksum:
            checkpoint_io.checksum_file(checkpoint).unlink()
        for argv in (
            ["fit", "tiny.yaml", "resume=auto", "trainer.max_steps=9"],
            ["fit", "tiny.yaml", f"resume={checkpoint}", "name=fork"],
            ["fit", "tiny.yaml", f"init_from={checkpoint}", "name=tuned"],
            ["validate", str(run)],
            ["test", str(run)],
            ["export", str(run), "out.safetensors"],
        ):
            capsys.readouterr()
            assert cli.main(argv) == cli.USER_ERROR, argv
            assert str(checkpoint) in capsys.readouterr().err
    assert not Path("executed").exists() and not Path("out.safetensors").exists()


def test_a_damaged_shard_ends_the_run_at_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    """With and without loader processes, in the same words."""
    experiment.build_data(load()).prepare_data()
    (folder,) = (path for path in cache.directory().iterdir() if path.is_dir())
    (shard,) = folder.glob("train-*.bin")
    flip(shard, random.Random(0))
    told = []
    for workers in (0, 2):
        capsys.readouterr()
        assert cli.main(["fit", "tiny.yaml", f"data.num_workers={workers}", f"name=w{workers}"]) == cli.USER_ERROR
        told.append(capsys.readouterr().err)
    assert told[0] == told[1] and str(shard) in told[0] and len(told[0].splitlines()) == 1


def test_a_kill_right_after_a_run_was_taken_up_loses_none_of_its_rows() -> None:
    run = experiment.run(load())
    before = runs.metrics_until(run, 100)
    MetricsTable(run / runs.METRICS, runs.metrics_until(run, 4))  # and nothing after it
    assert runs.metrics_until(run, 100) == [row for row in before if int(row["step"]) <= 4]


def test_lines_of_a_damaged_table_are_named_when_a_run_is_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    run = experiment.run(load())
    table = run / runs.METRICS
    lines = table.read_bytes().splitlines(keepends=True)
    of_step = {step: [i for i, line in enumerate(lines) if line.startswith(b"%d," % step)] for step in range(1, 7)}
    lines[of_step[2][0]] = b"2,1.5\n"
    lines[of_step[3][0]] = b"3,one" + lines[of_step[3][0]][lines[of_step[3][0]].index(b",", 2) :]
    del lines[of_step[4][0] : of_step[5][-1] + 1]
    lines[-1] = lines[-1][:-3]
    damaged = b"".join(lines)
    table.write_bytes(damaged)
    capsys.readouterr()
    experiment.run(load("resume=auto", "trainer.max_steps=8"))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(told) == 2 and all(str(table) in line for line in told)
    assert f"line {of_step[2][0] + 1} has 2 cells, not" in told[0]
    assert f"line {of_step[3][0] + 1} epoch" in told[0] or f"line {of_step[3][0] + 1} train/" in told[0]
    assert f"line {len(lines)} is cut off" in told[0] and "metrics.csv.damaged" in told[0]
    assert told[1].endswith("has no rows of 2 steps from 4 to 5")
    assert table.with_name("metrics.csv.damaged").read_bytes() == damaged
    assert {int(row["step"]) for row in runs.metrics_until(run, 99)} == {1, 2, 3, 6, 7, 8}
    table.write_bytes(b"")
    experiment.run(load("resume=auto", "trainer.max_steps=9"))
    assert f"note: {table} has no rows up to step 8\n" in capsys.readouterr().out


def test_points_that_a_full_disk_has_kept_from_tensorboard_are_drawn_on_resume(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each once, in order, with the curves against tokens."""
    asked = itertools.count()
    with monkeypatch.context() as patched:
        patched.setattr(Board, "is_writable", lambda _: next(asked) < 12)
        run = experiment.run(load())
    assert 0 < len(drawn(run)["train/loss"]) < 6
    experiment.run(load("resume=auto", "trainer.max_steps=8"))
    rows = runs.metrics_until(run, 99)
    for tag, curve in drawn(run).items():
        if not tag.startswith("vs_tokens/"):
            written = {int(row["step"]): float(row[tag]) for row in rows if tag in row}
            assert dict(curve) == pytest.approx(written) and len(curve) == len(written), tag
    assert [step for step, _ in drawn(run)["train/loss"]] == [*range(1, 9)]
    assert [step for step, _ in drawn(run)["vs_tokens/train/loss"]] == [64 * step for step in range(1, 9)]


def drawn(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: steps and values by tag."""
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_nothing_of_a_cut_off_save_stays() -> None:
    run = experiment.run(load())
    folder = run / runs.CHECKPOINTS
    for name in (".step_00000008.ckpt", ".step_00000008.ckpt.sha256", "step_00000008.ckpt.sha256", ".latest.ckpt.link"):
        (folder / name).write_bytes(b"half")
    experiment.run(load("resume=auto", "trainer.max_steps=7"))
    assert not list(folder.glob(".*"))
    assert not (folder / "step_00000008.ckpt.sha256").exists()


def tool(name: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *arguments], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forked")
@pytest.mark.soak
def test_interrupted_saves_leave_a_checkpoint_that_loads() -> None:
    assert "100 of 100 interrupted saves left latest.ckpt loadable" in tool("soak_saves.py", "--saves", "100")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forked")
@pytest.mark.parametrize(("workers", "more", "count"), [("0", ["--last-step"], 8), ("4", [], 2)])
@pytest.mark.soak
def test_killed_runs_go_on_as_if_nothing_had_been(workers: str, more: list[str], count: int) -> None:
    told = tool("soak_kills.py", "--kills", "2", "--saves", "1", "--workers", workers, "--seed", workers, *more)
    assert f"{count} of {count} are bit-identical to the undisturbed one" in told


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forked")
@pytest.mark.parametrize("accumulate", ["1", "3"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_sixty_kills_in_chains_of_three_leave_no_trace(workers: str, accumulate: str) -> None:
    """Fifteen of them with each of these settings."""
    numbers = {"--kills": "15", "--chain": "3", "--saves": "2", "--workers": workers, "--accumulate": accumulate}
    *_, last = tool("soak_kills.py", *itertools.chain(*numbers.items())).splitlines()
    assert re.fullmatch(r"(\d+) of \1 are bit-identical to the undisturbed one, after 15 kills", last), last


def test_a_directory_that_cannot_be_written_is_the_users_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recipe, "save", full)
    assert cli.main(["fit", "tiny.yaml"]) == cli.USER_ERROR
    told = capsys.readouterr().err
    assert "runs/tiny/version_0 cannot be written (No space left on device)" in told
    shutil.rmtree("runs", ignore_errors=True)


@pytest.mark.parametrize("noticed", ["when it logs", "when it saves"])
def test_a_run_whose_directory_is_removed_says_so(
    noticed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Remover(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                shutil.rmtree("runs/tiny/version_0")

    watchers = fitting.watchers
    monkeypatch.setattr(fitting, "watchers", lambda *given: [Remover(), *watchers(*given)])
    often = ["trainer.log_every_n_steps=1", "checkpoint.every_n_steps=100"]
    rarely = ["trainer.log_every_n_steps=100", "checkpoint.every_n_steps=1"]
    more = often if noticed == "when it logs" else rarely
    more += ["trainer.max_steps=9", "trainer.val_check_interval=9"]
    assert cli.main(["fit", "tiny.yaml", *more]) == cli.USER_ERROR
    told = capsys.readouterr().err
    assert int(told.partition("ended after step ")[2][0]) in (3, 4)
    assert "longnet: runs/tiny/version_0 was removed while the run wrote into it" in told
    assert not Path("runs/tiny/version_0").exists(), "it is not made again without its recipe"


SHARED_MEMORY = {
    "no process": OSError(errno.ENOSPC, "No space left on device"),
    "no batch": RuntimeError("unable to write to file </torch_17_42_0>: No space left on device (28)"),
}


@pytest.mark.parametrize("where", SHARED_MEMORY)
def test_too_little_shared_memory_for_loaders_is_named(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch and multiprocessing say it, where a semaphore or a batch finds no room."""

    def failing(*_: Any, **__: Any) -> None:
        raise SHARED_MEMORY[where]

    if where == "no process":
        monkeypatch.setattr(synchronize._multiprocessing, "SemLock", failing)
    else:
        monkeypatch.setattr(language_modeling.Windows, "__getitem__", failing)
    for number in (0, 2):
        code = cli.main(["fit", "tiny.yaml", "data.num_workers=1", f"trainer.num_sanity_val_steps={number}"])
        told = capsys.readouterr().err
        assert code == cli.USER_ERROR and "ran out of shared memory (/dev/shm); lower data.num_workers" in told
        assert "combined_loader" not in told


def test_an_error_of_starting_loaders_is_not_hidden_by_lightnings_clean_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any) -> None:
        raise data.DataError("this text cannot be read")

    monkeypatch.setattr(language_modeling.ResumableLoader, "_get_iterator", failing)
    assert cli.main(["fit", "tiny.yaml"]) == cli.USER_ERROR
    assert capsys.readouterr().err == "longnet: this text cannot be read\n"
