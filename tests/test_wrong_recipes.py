"""Wrong recipes and wrong data, as users write them: exit code 2, one message with the key or file, what was given and
what would do, and no model built."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch

from longnet_kit import cli, experiment, model, recipe
from longnet_kit.data import cache

GOOD = """\
name: tiny
model: {dim: 16, layers: 1, heads: 2, ffn_dim: 16}
data: {source: files, paths: [text.txt], tokenizer: bytes, seq_len: 16, batch_size: 2}
trainer: {max_steps: 2, limit_val_batches: 1, accelerator: cpu}
"""


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe that works, its text, and a token cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGNET_CACHE", str(tmp_path / "cache"))
    Path("good.yaml").write_text(GOOD)
    Path("text.txt").write_text("some text, line after line\n" * 300)
    return tmp_path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a model was built")

    monkeypatch.setattr(model, "build", build)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the command tells of its user's error."""
    started = time.monotonic()
    code = cli.main(argv)
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.err.startswith("longnet: ")
    assert "Traceback" not in captured.out + captured.err
    assert not Path("runs").exists(), "nothing was started"
    assert time.monotonic() - started < 10
    return captured.err


def test_the_good_recipe_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    """Else all the others would fail for a reason of their own."""
    assert cli.main(["fit", "good.yaml"]) == 0
    assert Path("runs/tiny/version_0/summary.json").is_file()


class Wrong(NamedTuple):
    """A file that is wrong, and what the message must hold."""

    text: str | bytes
    told: tuple[str, ...]


FILES = {
    "misspelled section": Wrong(GOOD + "modle: {dim: 3}\n", ("modle (wrong.yaml:5)", "did you mean model?")),
    "misspelled key": Wrong(GOOD + "checkpoint: {kep: 3}\n", ("checkpoint.kep (wrong.yaml:5)", "checkpoint.keep")),
    "key of another section": Wrong(GOOD + "lr: 1\n", ("lr (wrong.yaml:5)", "did you mean optimizer.lr?")),
    "key by another name": Wrong(GOOD + "optimizer: {learning_rate: 1}\n", ("wrong.yaml:5", "mean optimizer.lr?")),
    "dotted key": Wrong(GOOD + "optimizer.lr: 1\n", ("optimizer.lr (wrong.yaml:5)", "write it as optimizer with lr")),
    "text for a number": Wrong(GOOD + "seed: one\n", ("seed (wrong.yaml:5)", "got 'one'", "a whole number")),
    "number for text": Wrong(GOOD.replace("tiny", "1"), ("name (wrong.yaml:1)", "got 1", "expected text")),
    "list for a mapping": Wrong(GOOD + "optimizer: [1]\n", ("optimizer (wrong.yaml:5)", "got [1]", "a mapping")),
    "section without keys": Wrong(GOOD + "optimizer:\n", ("optimizer (wrong.yaml:5)", "null", "leave optimizer out")),
    "number out of range": Wrong(GOOD + "optimizer: {lr: -3e-3}\n", ("optimizer.lr", "got -0.003", "above 0")),
    "not a number": Wrong(GOOD + "optimizer: {lr: .nan}\n", ("optimizer.lr", "got nan", "above 0")),
    "too few items": Wrong(GOOD + "optimizer: {betas: [0.9]}\n", ("optimizer.betas", "[0.9]", "a list of 2 values")),
    "no name": Wrong(GOOD.replace("name: tiny", "seed: 1"), ("name (wrong.yaml)", "missing", "expected text")),
    "name that is no folder": Wrong(GOOD.replace("tiny", "a/b c"), ("name (wrong.yaml:1)", "'a/b c'", "letters")),
    "no length": Wrong(GOOD.replace("max_steps: 2, ", ""), ("trainer.max_steps", "missing", "at least 1")),
    "same key twice": Wrong(GOOD + "name: other\n", ("name (wrong.yaml:5)", "first at wrong.yaml:1", "keep one")),
    "broken YAML": Wrong(GOOD + "seed: [1,\n", ("wrong.yaml:6", "is not valid YAML", "expected")),
    "a tab": Wrong("name: x\n\tseed: 1\n", ("wrong.yaml:2", "not valid YAML", "indent with spaces")),
    "empty file": Wrong("# nothing\n", ("wrong.yaml", "is empty", "name and trainer.max_steps")),
    "a list": Wrong("- name: x\n", ("wrong.yaml", "holds a list", "key: value")),
    "not text": Wrong(b"name: x\ndescription: caf\xe9\n", ("wrong.yaml:2", "0xe9", "UTF-8")),
    "extends nothing": Wrong("extends: goood.yaml\n", ("extends (wrong.yaml:1)", "did you mean good.yaml?")),
    "extends itself": Wrong("extends: wrong.yaml\n", ("extends (wrong.yaml:1)", "circle", "wrong.yaml -> wrong.yaml")),
    "unknown import": Wrong(GOOD + "imports: [no_plugin]\n", ("imports[0] (wrong.yaml:5)", "'no_plugin'", "sys.path")),
    "unknown tag": Wrong(GOOD + "description: !!python/object:os.x {}\n", ("description", "leave it out")),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", FILES)
def test_wrong_files(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = FILES[case]
    Path("wrong.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    told = refusal(capsys, "fit", "wrong.yaml")
    assert [part for part in expected if part not in told] == [], told
    assert "problems" not in told, "one cause, one problem"


SPLIT = ["strategy.name=sequence_parallel"]


def branches(w: int) -> list[str]:
    return [f"model.attention.segment_lengths=[{w},16]", "model.attention.dilation_rates=[1,2]"]


OVERRIDES = {
    "no value": (["model.layers"], ("'model.layers'", "expected key.path=value")),
    "unknown path": (["model.depth=3"], ("model.depth (on the command line)", "known in model", "layers")),
    "item of a list": (["optimizer.betas[0]=0.5"], ("optimizer.betas[0]", "'optimizer.betas=[")),
    "not YAML": (["data.paths=[*.txt]"], ("data.paths", "'[*.txt]'", "quote text")),
    "misspelled choice": (["model.positions=ropes"], ("model.positions", "'ropes'", "did you mean 'rope'?")),
    "misspelled backend": (["model.attention.backend=dialted"], ("model.attention.backend", "did you mean 'dilated'?")),
    "key of another backend": (
        ["model.attention.backend=sdpa", "model.attention.segment_lengths=[4]"],
        ("model.attention.segment_lengths", "unknown key", "known in model.attention: backend"),
    ),
    "branches that do not pair": (
        ["model.attention.segment_lengths=[4]", "model.attention.dilation_rates=[1,2]"],
        ("model.attention (on the command line)", "segment_lengths has 1", "dilation_rates has 2", "one of each"),
    ),
    "heads that do not divide": (["model.heads=3"], ("model.dim", "got 16", "heads: 3", "like 15 or 18")),
    "misspelled source": (["data.source=file"], ("data.source", "'file'", "did you mean 'files'?")),
    "misspelled task": (["task=language_modelling"], ("task", "did you mean 'language_modeling'?")),
    "misspelled tokenizer": (["data.tokenizer=byte"], ("data.tokenizer", "'byte'", "did you mean 'bytes'?")),
    "trainer argument of the kit": (["trainer.logger=false"], ("trainer.logger", "the kit sets it", "metrics.csv")),
    "epochs": (["trainer.max_epochs=3"], ("trainer.max_epochs", "set trainer.max_steps")),
    "least steps": (["trainer.min_steps=1"], ("trainer.min_steps", "set trainer.max_steps")),
    "batches": (["trainer.limit_train_batches=2"], ("trainer.limit_train_batches", "set trainer.max_steps")),
    "list of devices on the CPU": (["trainer.devices=[0]"], ("trainer.devices", "got [0]", "the CPU", "like 1")),
    "precision without its package": (
        ["trainer.precision=transformer-engine"],
        ("trainer.precision", "'transformer-engine'", "install it", "bf16-mixed"),
    ),
    "no length of time": (["trainer.max_time={a: 1}"], ("trainer.max_time.a", "unknown key", "minutes")),
    "length of time by another name": (["trainer.max_time={hour: 1}"], ("max_time.hour", "did you mean 'hours'?")),
    "misspelled trainer argument": (["trainer.precison=32"], ("trainer.precison", "did you mean trainer.precision?")),
    "unknown precision": (["trainer.precision=bf16-mix"], ("trainer.precision", "did you mean 'bf16-mixed'?")),
    "no device": (["trainer.devices=0"], ("trainer.devices", "got 0", "at least 1")),
    "unknown device": (["trainer.accelerator=cudda"], ("trainer.accelerator", "'cudda'", "did you mean 'cuda'?")),
    "sequence parallel without a strategy": (
        ["strategy.sequence_parallel_size=2"],
        ("strategy.sequence_parallel_size", "got 2", "auto", "set it to 1"),
    ),
    "sequence parallel on too few devices": (
        [*SPLIT, "strategy.sequence_parallel_size=2"],
        ("strategy.sequence_parallel_size", "got 2", "does not divide the 1 devices", "or 2 devices"),
    ),
    "ranks that do not divide the devices": (
        [*SPLIT, "strategy.sequence_parallel_size=8", "trainer.devices=2", "trainer.num_nodes=2"],
        ("strategy.sequence_parallel_size", "got 8", "the 4 devices", "use one of 1, 2, 4, or 8 devices"),
    ),
    "ranks that do not divide the sequence": (
        [*SPLIT, "strategy.sequence_parallel_size=3", "trainer.devices=3"],
        ("data.seq_len", "a sequence of 16 tokens", "3 ranks", "a length like 15 or 18"),
    ),
    "a segment that does not tile a shard": (
        [*SPLIT, "strategy.sequence_parallel_size=2", "trainer.devices=2", *branches(3)],
        ("model.attention", "a segment of 3 tokens", "a shard of 8", "16 on 2 ranks", "a segment length of 2", "of 18"),
    ),
    "a segment that does not span shards": (
        [*SPLIT, "strategy.sequence_parallel_size=4", "trainer.devices=4", *branches(10)],
        (
            "model.attention",
            "a segment of 10 tokens",
            "a shard of 4",
            "16 on 4 ranks",
            "a segment length of 8",
            "of 40",
        ),
    ),
    "heads that do not divide among ranks": (
        [*SPLIT, "strategy.sequence_parallel_size=4", "trainer.devices=4", "model.attention.backend=sdpa"],
        ("model.attention", "2 heads do not divide among 4 ranks", "sequence_parallel_size of 2", "4 heads", "dilated"),
    ),
    "windows that do not fit shards": (
        [*SPLIT, "strategy.sequence_parallel_size=4", "trainer.devices=4", "data.eval_contexts=[2,9]"],
        ("data.eval_contexts", "windows of 9 tokens", "a shard of 4", "use 8 or 12"),
    ),
    "windows whose shards do not divide the heads": (
        [
            *SPLIT,
            "strategy.sequence_parallel_size=4",
            "trainer.devices=4",
            "data.eval_contexts=[12]",
            "model.heads=8",
            "model.attention.backend=sdpa",
        ],
        ("data.eval_contexts", "windows of 12 tokens", "8 heads do not divide among 3 ranks"),
    ),
    "a precision that FSDP does not take": (
        ["strategy.name=fsdp", "trainer.precision=16-mixed"],
        ("trainer.precision", "'16-mixed'", "fsdp does not take", "bf16-mixed"),
    ),
    "ranks that do not divide devices known late": (
        [*SPLIT, "strategy.sequence_parallel_size=2", "trainer.devices=auto", "model.attention.backend=sdpa"],
        ("strategy.sequence_parallel_size", "does not divide the 1 devices"),
    ),
    "no time to wait": ([*SPLIT, "strategy.timeout=0"], ("strategy.timeout", "got 0", "above 0")),
    "unknown strategy": (["strategy.name=dpp"], ("strategy.name", "'dpp'", "did you mean 'ddp'?")),
    "weights that are not there": (["init_from=runs/none"], ("init_from", "'runs/none'", "a run directory")),
    "a run that is not there": (["resume=runs/none"], ("resume", "'runs/none'", "auto")),
    "an interpolation of nothing": (["seed=${model.width}"], ("seed (on the command line)", "model.width")),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", OVERRIDES)
def test_wrong_overrides(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, expected = OVERRIDES[case]
    told = refusal(capsys, "fit", "good.yaml", *overrides)
    assert [part for part in expected if part not in told] == [], told
    assert "problems" not in told, "one cause, one problem"


@pytest.mark.usefixtures("no_model")
def test_wrong_paths(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'quickstart'?" in refusal(capsys, "fit", "quickstrt.yaml")
    assert "'nowhere/r.yaml'" in refusal(capsys, "show", "nowhere/r.yaml")
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(GOOD)
    told = refusal(capsys, "fit", "run")
    assert "run: is a directory" in told
    assert f"did you mean {Path('run/recipe.yaml')}?" in told


@pytest.mark.usefixtures("no_model")
def test_many_problems_of_many_files_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    Path("low.yaml").write_text(GOOD.replace("layers: 1", "layers: 0") + "imports: [no_plugin]\n")
    Path("wrong.yaml").write_text("extends: low.yaml\nseed: x\nseeds: 1\ncheckpoint: {keep: 3, keep: 4}\n")
    told = refusal(capsys, "fit", "wrong.yaml", "trainer.max_step=3", "data.seq_len", "model.heads=5")
    places = {
        "model.layers": "low.yaml:2",
        "imports[0]": "low.yaml:5",
        "seed": "wrong.yaml:2",
        "seeds": "wrong.yaml:3",
        "checkpoint.keep": "wrong.yaml:4",
        "trainer.max_step": "on the command line",
        "model.dim": "low.yaml:2",
    }
    assert "longnet: wrong.yaml: 8 problems\n" in told
    assert len(told.splitlines()) == 9
    assert [f"\n  {key} ({place}): " for key, place in places.items() if f"\n  {key} ({place}): " not in told] == []
    assert "\n  on the command line: got 'data.seq_len'" in told


def jsonl(*lines: str) -> Callable[[], object]:
    return lambda: Path("text.jsonl").write_text("\n".join(lines) + "\n")


def bad_bytes() -> None:
    Path("text.txt").write_bytes(b"good\n" * 100 + b"caf\xe9\n" + b"good\n" * 100)


DATA: dict[str, tuple[Callable[[], object], list[str], tuple[str, ...]]] = {
    "missing file": (lambda: None, ["data.paths=[none.txt]"], ("data.paths", "none.txt", "does not exist")),
    "pattern without a match": (lambda: None, ["data.paths=['*.rs']"], ("data.paths", "*.rs", "no file matches")),
    "folder": (lambda: Path("sub").mkdir(), ["data.paths=[sub]"], ("data.paths", "sub is a folder", "give its files")),
    "empty file": (lambda: Path("text.txt").write_text(""), [], ("seq_len 16", "train: 0 tokens", "use more text")),
    "too short": (lambda: Path("text.txt").write_text("short\n"), [], ("seq_len 16", "17 tokens", "use more text")),
    "not text": (bad_bytes, ["data.tokenizer=gpt2"], ("text.txt", "0xe9", "not UTF-8", "data.errors")),
    "not JSON": (jsonl('{"text": "a"}', "{text: b}"), ["data.paths=[text.jsonl]"], ("text.jsonl, line 2", "not JSON")),
    "no such field": (jsonl('{"body": "a"}'), ["data.paths=[text.jsonl]"], ("line 1", "'text'", "data.field")),
    "no tokenizer file": (
        lambda: None,
        ["data.tokenizer=none.json"],
        ("data.tokenizer", "none.json does not exist"),
    ),
    "broken tokenizer file": (
        lambda: Path("broken.json").write_text("{}"),
        ["data.tokenizer=broken.json"],
        ("data.tokenizer", "broken.json is not a JSON file of the `tokenizers` library"),
    ),
    "unknown data set": (
        lambda: None,
        ["data.source=huggingface", "data.path=json", "data.data_files=[none.jsonl]"],
        ("huggingface", "'json'", "data_files"),
    ),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", DATA)
def test_wrong_data(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, overrides, expected = DATA[case]
    prepare()
    told = refusal(capsys, "fit", "good.yaml", *overrides)
    assert [part for part in expected if part not in told] == [], told


def make_cache(capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder of the good recipe's tokens, as a first run leaves it."""
    experiment.build_data(recipe.load("good.yaml")).prepare_data()
    capsys.readouterr()
    (folder,) = (path for path in cache.directory().iterdir() if path.is_dir())
    return folder


def cut_shard(folder: Path) -> None:
    (shard,) = folder.glob("train-*.bin")
    shard.write_bytes(shard.read_bytes()[:-100])


def change_manifest(folder: Path) -> None:
    manifest = json.loads((folder / cache.MANIFEST).read_text())
    manifest["dtype"] = "<u4"
    (folder / cache.MANIFEST).write_text(json.dumps(manifest))


CORRUPTIONS: dict[str, Callable[[Path], object]] = {
    "garbage for a manifest": lambda folder: (folder / cache.MANIFEST).write_bytes(b"\x00\x01"),
    "manifest changed by hand": change_manifest,
    "manifest gone": lambda folder: (folder / cache.MANIFEST).unlink(),
    "shard cut short": cut_shard,
    "shard gone": lambda folder: [shard.unlink() for shard in folder.glob("train-*.bin")],
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", CORRUPTIONS)
def test_a_damaged_cache(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_cache(capsys)
    CORRUPTIONS[case](folder)
    told = refusal(capsys, "fit", "good.yaml")
    assert str(folder) in told
    assert "delete" in told


def test_a_flipped_bit_in_the_cache_ends_the_run_when_it_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_cache(capsys)
    (shard,) = folder.glob("train-*.bin")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert cli.main(["fit", "good.yaml"]) == 2
    told = capsys.readouterr().err
    assert str(shard) in told
    assert "delete" in told
    assert "Traceback" not in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is there")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "good.yaml", "trainer.accelerator=gpu"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("longnet: trainer: ")
    assert "gpu" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.usefixtures("no_model")
def test_a_list_of_devices_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, "fit", "good.yaml", "trainer.accelerator=auto", "trainer.devices=[0]")
    assert "trainer.devices" in told and "got [0]" in told and "like 1" in told


def cut_short(ckpt: Path) -> Path:
    Path("cut.ckpt").write_bytes(ckpt.read_bytes()[:-1000])
    return Path("cut.ckpt")


def weights_alone(ckpt: Path) -> Path:
    torch.save({"state_dict": torch.load(ckpt)["state_dict"]}, "alone.ckpt")
    return Path("alone.ckpt")


NO_CHECKPOINTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "another file": (
        lambda ckpt: Path("text.txt"),
        ("text.txt is a text file", "expected a run directory, a checkpoint"),
    ),
    "a truncated one": (cut_short, ("cut.ckpt is damaged or no checkpoint", "cut off", "give another")),
    "weights alone": (weights_alone, ("alone.ckpt holds no", "loops", "use init_from")),
    "of another size": (
        lambda ckpt: Path(shutil.copy(ckpt, "wide.ckpt")),
        ("wide.ckpt do not fit", "(16, 16) there and (17, 16) here"),
    ),
}


@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_resumed(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, expected = NO_CHECKPOINTS[case]
    assert cli.main(["fit", "good.yaml", "trainer.max_steps=1"]) == 0
    ckpt = make(Path("runs/tiny/version_0/checkpoints/step_00000001.ckpt"))
    shutil.rmtree("runs")
    capsys.readouterr()
    width = ["model.ffn_dim=17"] if case == "of another size" else []
    told = refusal(capsys, "fit", "good.yaml", f"resume={ckpt}", *width)
    assert [part for part in expected if part not in told] == [], told
    assert len(told.splitlines()) == 1


def test_a_file_in_the_way_of_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").write_text("")
    assert cli.main(["fit", "good.yaml"]) == 2
    told = capsys.readouterr().err
    assert "runs/tiny: cannot make this folder" in told and "rename" in told


def test_weights_from_a_recipe_are_refused_without_advice_to_delete_it(capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, "fit", "good.yaml", "init_from=good.yaml")
    assert "good.yaml is a recipe, or another text file" in told and "expected a run directory" in told
    assert "delete" not in told


def test_weights_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "good.yaml"]) == 0
    capsys.readouterr()
    assert cli.main(["fit", "good.yaml", "name=wider", "model.ffn_dim=17", "init_from=runs/tiny"]) == 2
    told = capsys.readouterr().err
    assert "runs/tiny/version_0" in told
    assert "(17, 16)" in told
    assert not Path("runs/wider").exists()
