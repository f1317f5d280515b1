"""What `longnet export` writes, and what reads it back: this kit, and programs that have never heard of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import longnet_kit
from longnet_kit import checkpoint_io, cli, experiment, export, recipe, runs, weights
from tests.test_readme import block
from tests.trained import EXPORTED as FILE
from tests.trained import train

RECIPE = """
name: tiny
model: {dim: 16, layers: 2, heads: 2, ffn_dim: 32, dropout: 0.1,
        attention: {backend: dilated, segment_lengths: [8, 32], dilation_rates: [1, 2]}}
data: {source: files, paths: [text.txt], tokenizer: bytes, seq_len: 32, batch_size: 4}
optimizer: {lr: 1.0e-2, warmup_steps: 2}
trainer: {max_steps: 4, limit_val_batches: 0, enable_progress_bar: false, accelerator: cpu}
checkpoint: {every_n_steps: 2, keep: 2}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a recipe, a text, a run and its exported weights."""
    return train(tmp_path_factory.mktemp("trained"), RECIPE)


@pytest.fixture(autouse=True)
def desk(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which a test may spoil."""
    desk = shutil.copytree(trained, tmp_path / "desk")
    monkeypatch.chdir(desk)
    return desk


def load(*overrides: str) -> recipe.Recipe:
    return recipe.load("tiny.yaml", list(overrides))


def in_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    return {k.removeprefix("model."): x for k, x in torch.load(path, weights_only=True)["state_dict"].items()}


def write(saved: dict[str, Any], path: Path) -> None:
    """Write a checkpoint that no run would, without the checksum of the one before."""
    torch.save(saved, path)
    checkpoint_io.checksum_file(path).unlink()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and torch.equal(found[name], x), name


def test_the_file_holds_the_newest_weights_and_where_they_are_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "runs/tiny/version_0", "again.safetensors"]) == 0
    told = capsys.readouterr().out
    assert "exported step 4 of runs/tiny/version_0 to again.safetensors: " in told
    assert load_file("again.safetensors").keys() == experiment.build_task(load()).model.state_dict().keys()
    assert_same(load_file("again.safetensors"), in_checkpoint(runs.checkpoint(Path("runs/tiny/version_0"))))
    with safe_open("again.safetensors", framework="pt") as file:
        told = file.metadata()
    checksum = told.pop(weights.DIGEST)
    assert checksum == weights.digest(load_file("again.safetensors"), told)
    assert told == {
        "format": "pt",
        "recipe": recipe.dumps(load()),
        "step": "4",
        "longnet_kit": longnet_kit.__version__,
    }


@pytest.mark.parametrize(
    "line",
    [
        "test runs/tiny trainer.limit_test_batches=1", "validate runs/tiny trainer.limit_val_batches=1",
        "export runs/tiny again.safetensors", "stream tiny.yaml text.txt --tokens 99",
        "generate runs/tiny --prompt a --max-new-tokens 1", "compare runs/tiny",
        "fit tiny.yaml name=tuned init_from=runs/tiny trainer.max_steps=1",
        "fit tiny.yaml name=fork resume=runs/tiny trainer.max_steps=5",
    ],
)  # fmt: skip
def test_every_verb_that_reads_a_run_says_which_version_and_checkpoint(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("runs/tiny/version_0", "runs/tiny/version_1")
    runs.write_summary(Path("runs/tiny/version_1"), "stopped", {})
    assert cli.main(line.split()) == 0
    captured = capsys.readouterr()
    told = captured.out + captured.err
    assert told.count("means version_0 here (finished, step 4); newer: version_1 (stopped, step 4)") == 1
    if line.startswith("compare"):
        return
    assert told.count("runs/tiny/version_0/checkpoints/step_00000004.ckpt") >= 1
    if line.startswith(("generate", "export")):
        assert "note" not in captured.out and "reads" not in captured.out


def test_a_run_that_is_resumed_says_where_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    experiment.run(load("resume=auto", "trainer.max_steps=5"))
    ckpt = "runs/tiny/version_0/checkpoints/step_00000004.ckpt"
    assert f"tiny: 5 steps into runs/tiny/version_0; goes on from step 4, {ckpt}\n" in capsys.readouterr().out
    shutil.rmtree("runs/tiny/version_0/checkpoints")
    experiment.run(load("resume=auto", "trainer.max_steps=6"))
    told = "tiny: 6 steps into runs/tiny/version_0; starts from scratch, since no checkpoint was saved there\n"
    assert told in capsys.readouterr().out
    experiment.run(load("resume=auto", "name=other", "trainer.max_steps=1"))
    told = "other: 1 steps into runs/other/version_0; starts from scratch, since there is no run of this name yet\n"
    assert told in capsys.readouterr().out


def test_a_run_is_found_by_its_name_and_by_its_recipe() -> None:
    newer = experiment.run(load("seed=2", "trainer.max_steps=2"))
    assert newer.name == "version_1"
    for run in ("runs/tiny", "tiny.yaml"):
        assert_same(load_file(export.export(run, "newer.safetensors")), in_checkpoint(runs.checkpoint(newer)))
    with safe_open("newer.safetensors", framework="pt") as file:
        assert "seed: 2\n" in file.metadata()["recipe"] and file.metadata()["step"] == "2"


@pytest.mark.parametrize("run", ["runs/tiny/version_0", "runs/tiny"])
def test_an_older_checkpoint_can_be_asked_for(run: str) -> None:
    experiment.run(load("seed=2", "trainer.max_steps=2"))
    older = Path("runs/tiny/version_0/checkpoints/step_00000002.ckpt")
    assert cli.main(["export", run, "--checkpoint", str(older), "older.safetensors"]) == 0
    assert_same(load_file("older.safetensors"), in_checkpoint(older))
    with safe_open("older.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "2" and "seed: 1234\n" in file.metadata()["recipe"]


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_weights_keep_their_dtype(precision: str, dtype: torch.dtype) -> None:
    run = experiment.run(load(f"trainer.precision={precision}", "name=other", "trainer.max_steps=2"))
    found = load_file(export.export(run, "other.safetensors"))
    assert {x.dtype for x in found.values()} == {dtype}
    assert_same(found, in_checkpoint(runs.checkpoint(run)))
    task = experiment.build_task(load("init_from=other.safetensors", f"trainer.precision={precision}"))
    for name, x in task.model.state_dict().items():
        assert torch.equal(x.to(dtype), found[name]), name


def test_what_fsdp_wrote_is_exported_whole() -> None:
    command = [sys.executable, "-m", "longnet_kit.cli", "fit", "tiny.yaml", "name=two", "data.batch_size=2"]
    command += ["trainer.devices=2", "strategy.name=fsdp"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    found, alone = load_file(export.export("runs/two", "two.safetensors")), load_file(FILE)
    assert_same(found, in_checkpoint(runs.checkpoint(Path("runs/two/version_0"))))
    for name, x in alone.items():
        torch.testing.assert_close(found[name], x, rtol=1e-3, atol=1e-5)


def test_a_run_starts_from_an_exported_file_as_from_the_run() -> None:
    from_file, from_run = (
        experiment.run(load(f"init_from={source}", f"name={name}", "trainer.max_steps=1"))
        for source, name in ((FILE, "file"), ("runs/tiny", "run"))
    )
    assert_same(*(in_checkpoint(runs.checkpoint(run)) for run in (from_file, from_run)))
    with safe_open(export.export(from_file, "tuned.safetensors"), framework="pt") as file:
        assert "init_from: null\n" in file.metadata()["recipe"], "the file says all; where it came from may move"
    with pytest.raises(ValueError, match=rf"{FILE} do not fit this model: .*\(257, 16\) there and \(257, 32\) here"):
        experiment.build_task(load(f"init_from={FILE}", "model.dim=32"))


def test_training_does_not_go_on_from_weights_alone() -> None:
    with pytest.raises(ValueError, match=rf"{FILE} holds no .*training cannot go on from it; .*use init_from"):
        weights.check_resumable(experiment.build_task(load()).model, Path(FILE))  # type: ignore[arg-type]


def test_the_readmes_lines_read_it_without_this_kit() -> None:
    shutil.copy(FILE, "quickstart.safetensors")
    lines = block("python", "safe_open")
    assert len([line for line in lines.splitlines() if line]) <= 5
    program = f"""
import sys
sys.modules["longnet_kit"] = None
try:
    import longnet_kit
except ImportError:
    pass
else:
    raise SystemExit("the kit is there")
{lines}
import torch
torch.save(weights, "read.pt")
print(step, recipe, end="")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"4 {recipe.dumps(load())}"
    assert_same(torch.load("read.pt"), in_checkpoint(runs.checkpoint(Path("runs/tiny/version_0"))))


def test_the_readmes_lines_build_the_network_from_the_file_alone() -> None:
    expected = experiment.build_task(load())
    weights.load(expected.model, Path("runs/tiny"))  # type: ignore[arg-type]
    shutil.move(FILE, "quickstart.safetensors")
    shutil.rmtree("runs")
    Path("tiny.yaml").unlink()
    names: dict[str, Any] = {}
    exec(block("python", "safe_open") + block("python", "load_state_dict(weights)"), names)
    tokens = torch.randint(256, (2, 50))
    with torch.no_grad():
        assert torch.equal(names["task"].eval().model(tokens), expected.eval().model(tokens))


def test_tied_and_transposed_weights_are_written_out() -> None:
    path = runs.checkpoint(Path("runs/tiny/version_0"))
    saved = torch.load(path, weights_only=True)
    x, y = torch.randn(3, 5), torch.randn(3, 5)
    made = {"first": x, "again": x, "turned": x.T, "row": x[1], "turned alone": y.T}
    saved["state_dict"] |= {f"model.{name}": z for name, z in made.items()}
    saved["state_dict"]["of_the_task"] = x
    write(saved, path)
    found = load_file(export.export("runs/tiny", "tied.safetensors"))
    assert "of_the_task" not in found
    assert_same({name: found[name] for name in made}, made)


def test_everyone_may_read_it_who_may_read_a_new_file() -> None:
    Path("new").touch()
    assert Path(FILE).stat().st_mode == Path("new").stat().st_mode


def test_a_write_that_fails_leaves_the_file_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of i")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    before, files = Path(FILE).read_bytes(), set(Path().iterdir())
    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(ValueError, match=rf"output {FILE}: cannot be written \(.*No space left.*\); name a file"):
        export.export("runs/tiny", FILE)
    assert Path(FILE).read_bytes() == before
    assert set(Path().iterdir()) == files


def test_the_disk_has_the_file_before_it_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[bool] = []
    monkeypatch.setattr("os.fsync", lambda _: there.append(Path("synced.safetensors").exists()))
    export.export("runs/tiny", "synced.safetensors")
    assert there == [False, True], "the file, then its name"


def flip_a_bit() -> None:
    path = runs.checkpoint(Path("runs/tiny/version_0"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short() -> None:
    path = runs.checkpoint(Path("runs/tiny/version_0"))
    path.write_bytes(path.read_bytes()[:-1000])


def keep_only(*keys: str) -> None:
    path = runs.checkpoint(Path("runs/tiny/version_0"))
    write({key: value for key, value in torch.load(path).items() if key in keys}, path)


def add_a_number() -> None:
    path = runs.checkpoint(Path("runs/tiny/version_0"))
    saved = torch.load(path)
    saved["state_dict"]["model.scale"] = 3.0
    write(saved, path)


def nothing() -> None: ...


WRONG: dict[str, tuple[Callable[[], object], list[str], tuple[str, ...]]] = {
    "another suffix": (nothing, ["runs/tiny", "out.pt"], ("output out.pt: the name must end in .safetensors",)),
    "no folder": (nothing, ["runs/tiny", "no/o.safetensors"], ("output no/o.safetensors", "there is no folder no")),
    "a folder": (lambda: Path("o.safetensors").mkdir(), ["runs/tiny", "o.safetensors"], ("it is a folder", "name a")),
    "a folder that takes nothing": (nothing, ["runs/tiny", "/proc/o.safetensors"], ("/proc/o", "cannot be written (")),
    "no run": (nothing, ["runs/none", "o.safetensors"], ("'runs/none'",)),
    "a recipe without one": (lambda: Path("other.yaml").write_text(RECIPE.replace("name: tiny", "name: other")),
                             ["other.yaml", "o.safetensors"], ("runs/other: no run here", "there are: runs/tiny")),
    "a checkpoint as the run": (nothing, ["runs/tiny/version_0/checkpoints/step_00000004.ckpt", "o.safetensors"],
                                ("is a checkpoint; give the run", "--checkpoint runs/tiny/")),
    "no checkpoint": (lambda: shutil.rmtree("runs/tiny/version_0/checkpoints"), ["runs/tiny", "o.safetensors"],
                      ("has no checkpoint",)),
    "a checkpoint that is not there": (
        nothing, ["runs/tiny", "o.safetensors", "--checkpoint", "runs/tiny/version_0/checkpoints/step_00000003.ckpt"],
        ("--checkpoint runs/tiny/version_0/checkpoints/step_00000003.ckpt", "did you mean 'runs/tiny/version_0"),
    ),
    "another run's checkpoint": (
        lambda: shutil.copytree("runs/tiny", "runs/other"),
        ["runs/tiny", "o.safetensors", "--checkpoint", "runs/other/version_0/checkpoints/step_00000004.ckpt"],
        ("no checkpoint of runs/tiny;", "did you mean 'runs/tiny/version_0/checkpoints/step_00000004.ckpt'?"),
    ),
    "a damaged checkpoint": (flip_a_bit, ["runs/tiny", "o.safetensors"],
                             ("step_00000004.ckpt is damaged", "give another one")),
    "a checkpoint cut short": (cut_short, ["runs/tiny", "o.safetensors"], ("step_00000004.ckpt is damaged",)),
    "weights alone": (lambda: keep_only("state_dict"), ["runs/tiny", "o.safetensors"],
                      ("step_00000004.ckpt", "no checkpoint that a run wrote")),
    "no weights": (lambda: keep_only("global_step"), ["runs/tiny", "o.safetensors"],
                   ("step_00000004.ckpt is not a checkpoint",)),
    "something else among the weights": (add_a_number, ["runs/tiny", "o.safetensors"],
                                         ("step_00000004.ckpt", "no tensor in scale;")),
    "no file": (nothing, ["runs/tiny"], ("OUT",)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_exported_is_told(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, arguments, expected = WRONG[case]
    spoil()
    assert cli.main(["export", *arguments]) == 2
    told = capsys.readouterr().err
    assert [part for part in expected if part not in told] == [], told
    assert "Traceback" not in told and not Path("o.safetensors").is_file()


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


DAMAGED = r"b\.safetensors is not a safetensors file, or it is damaged \(.+\); give another one"
BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda raw: raw[:-1000], DAMAGED),
    "empty": (lambda raw: b"", DAMAGED),
    "text": (
        lambda raw: b"The quick brown fox jumps over the lazy dog",
        r"b\.safetensors is a text file, and holds no",
    ),
    "a damaged header": (lambda raw: raw[:30] + b"\xff" + raw[31:], DAMAGED),
    "no tensor": (lambda raw: header(json.dumps({})), r"b\.safetensors do not fit .*embedding.weight is only here"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_told(case: str) -> None:
    spoil, expected = BROKEN[case]
    Path("b.safetensors").write_bytes(spoil(Path(FILE).read_bytes()))
    with pytest.raises(ValueError, match=expected):
        experiment.build_task(load("init_from=b.safetensors"))


def test_a_checkpoint_under_the_other_name_is_told() -> None:
    shutil.copy(runs.checkpoint(Path("runs/tiny/version_0")), "renamed.safetensors")
    shutil.copy(FILE, "renamed.ckpt")
    with pytest.raises(ValueError, match=r"renamed\.safetensors is not a safetensors file"):
        experiment.build_task(load("init_from=renamed.safetensors"))
    with pytest.raises(ValueError, match=r"renamed\.ckpt is damaged or no checkpoint"):
        experiment.build_task(load("init_from=renamed.ckpt"))


def test_another_networks_file_is_told() -> None:
    save_file({"embed.weight": torch.zeros(257, 16), "norm.weight": torch.zeros(16)}, "foreign.safetensors")
    with pytest.raises(ValueError, match=r"foreign.safetensors do not fit .*embedding.weight is only here.* more"):
        experiment.build_task(load("init_from=foreign.safetensors"))
