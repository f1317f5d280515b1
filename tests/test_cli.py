"""The command line: what it prints, which function it calls, its exit codes, and that it starts quickly."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longnet_kit import board, cli, cli_arguments, experiment, export, recipe, shipped, sweep, testing
from longnet_kit.inference import CHUNK, console, stream
from longnet_kit.inference.sampling import Sampling
from longnet_kit.inference.score import Score
from longnet_kit.recipe import Recipe
from longnet_kit.report import compare, pattern
from tests.recipes import SMALLEST

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMAND = [sys.executable, "-m", "longnet_kit.cli"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that the verbs make, none of which is carried out."""
    made: list[Any] = []

    def record(result: Any) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            made.append((*arguments, *named.items()))
            return result

        return call

    monkeypatch.setattr(experiment, "run", record(Path()))
    monkeypatch.setattr(experiment, "evaluate", record({}))
    monkeypatch.setattr(export, "export", record(Path()))
    monkeypatch.setattr(testing, "main_check", record(1))
    monkeypatch.setattr(pattern, "draw", record("a picture"))
    monkeypatch.setattr(compare, "compare", record("a table"))
    monkeypatch.setattr(board, "serve", record(None))
    monkeypatch.setattr(sweep, "sweep", record(1))
    return made


def test_fit_runs_the_recipe_with_its_overrides(calls: list[Any]) -> None:
    assert cli.main(["fit", "quickstart", "model.layers=2", "seed=5"]) == 0
    ((r,),) = calls
    assert isinstance(r, Recipe)
    assert r == recipe.load("quickstart", ["model.layers=2", "seed=5"])


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_validate_and_test_evaluate_a_run(verb: str, calls: list[Any]) -> None:
    assert cli.main([verb, "runs/quickstart", "trainer.limit_val_batches=1"]) == 0
    assert calls == [("runs/quickstart", ["trainer.limit_val_batches=1"], ("which", verb))]


def test_export_takes_a_run_a_file_and_a_checkpoint_in_any_order(calls: list[Any]) -> None:
    assert cli.main(["export", "runs/quickstart", "out.safetensors"]) == 0
    assert cli.main(["export", "--checkpoint", "step.ckpt", "runs/quickstart", "out.safetensors"]) == 0
    run = ("runs/quickstart", Path("out.safetensors"))
    assert calls == [(*run, None), (*run, Path("step.ckpt"))]


def test_pattern_takes_a_length_a_file_and_keys_in_any_order(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pattern", "quickstart", "model.heads=2", "--output", "a.png", "length=9", "model.layers=1"]) == 0
    assert calls == [(recipe.load("quickstart", ["model.heads=2", "model.layers=1"]), 9, Path("a.png"))]
    assert capsys.readouterr().out == "a picture\n"
    assert cli.main(["pattern", "quickstart"]) == 0
    assert calls[1][1:] == (16, None)


def test_sweep_passes_its_items_and_its_verdict(calls: list[Any]) -> None:
    assert cli.main(["sweep", "quickstart", "model.layers=1,2", "seed=3"]) == 1
    assert calls == [(["quickstart"], ["model.layers=1,2", "seed=3"])]
    cli.main(["sweep", "quickstart", "folder", "seed=1,2", "other.yaml"])
    assert calls[1] == (["quickstart", "folder", "other.yaml"], ["seed=1,2"])


def test_compare_takes_runs_and_options_in_any_order(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    line = "compare runs/a --metric val/loss --plot p.png runs/b --against tokens --metric train/loss --csv t.csv"
    assert cli.main([*line.split(), "--sort", "train/lr", "--markdown", "runs/*"]) == 0
    options = {"sort": "train/lr", "metrics": ["val/loss", "train/loss"], "plot": Path("p.png"), "against": "tokens",
               "csv": Path("t.csv"), "markdown": True}  # fmt: skip
    assert calls == [(["runs/a", "runs/b", "runs/*"], *options.items())]
    assert capsys.readouterr().out == "a table\n"
    assert cli.main(["compare"]) == 0
    options = {"sort": None, "metrics": [], "plot": None, "against": "steps", "csv": None, "markdown": False}
    assert calls[1] == ([], *options.items())


def test_board_takes_a_directory_a_host_and_a_port(calls: list[Any]) -> None:
    assert cli.main(["board"]) == 0
    assert cli.main(["board", "elsewhere", "--port", "0", "--host", "0.0.0.0"]) == 0
    assert calls == [(Path("runs"), "localhost", None), (Path("elsewhere"), "0.0.0.0", 0)]


def test_generate_takes_prompts_and_options_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(console, "run", lambda *arguments, **named: made.append((*arguments, named)))
    line = "generate --prompt a runs/x --prompt-file f --prompt b --top-k 5 --top-p 0.5 --temperature 0.7 --seed 3"
    assert cli.main([*line.split(), "--max-new-tokens", "1_000", "--stop", "x", "--json", "--echo"]) == 0
    named = {"max_new_tokens": 1000, "sampling": Sampling(0.7, 5, 0.5), "seed": 3, "samples": 1, "stop": ["x"]}
    named |= {"chunk": CHUNK, "max_cached": None, "echo": True, "as_json": True, "device": None}
    assert made == [("runs/x", ["a", "b"], ["f"], named)]


@pytest.mark.parametrize(("signum", "code"), [(0, 0), (15, 143)])
def test_stream_takes_files_and_options_in_any_order(signum: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    result = stream.Result(Path(), 1, Score(), 1.0, signum)
    monkeypatch.setattr(stream, "stream", lambda *arguments, **named: made.append((*arguments, named)) or result)
    line = "stream runs/x a.txt --extend b.txt --tokens 1,000,000 --repeat --chunk 64 --errors skip --output d"
    assert cli.main([*line.split(), "--max-cached", "9", "--device", "cpu"]) == code
    named = {"tokens": 1_000_000, "repeat": True, "extend": True, "chunk": 64, "errors": "skip", "max_cached": 9}
    assert made == [("runs/x", ["a.txt", "b.txt"], named | {"output": Path("d"), "device": "cpu"})]


def test_check_backend_passes_options_and_its_verdict(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "plugin_of_check_backend.py").write_text("MARK = 1\n")
    options = ["size=5", "pattern.kind=dilated", "lengths=[4,8]", "imports=[plugin_of_check_backend]"]
    assert cli.main(["check-backend", "window", *options]) == 1
    assert calls == [("window", {"size": 5, "pattern": {"kind": "dilated"}, "lengths": [4, 8]})]
    assert "plugin_of_check_backend" in sys.modules


def test_check_backend_holds_a_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-backend", "sdpa"]) == 0
    assert "0 broken" in capsys.readouterr().out


def test_show_prints_the_resolved_recipe_and_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "quickstart", "trainer.max_steps=10"]) == 0
    shown = capsys.readouterr().out
    assert "head_offsets: interleaved" in shown, "the defaults of choices too"
    assert "warmup_steps: 10" in shown
    assert "note: optimizer.warmup_steps 30 clipped" in shown
    assert "parameters" in shown
    assert "FLOPs per token" in shown


def test_list_names_every_shipped_recipe_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    assert dict(rows) == {n: recipe.load(n).description for n in shipped.names()}


def test_list_shows_the_users_recipes_and_says_which_are_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "sub").mkdir(parents=True)
    Path("recipes/mine.yaml").write_text("description: a line of mine\n" + SMALLEST)
    Path("recipes/heir.yaml").write_text("extends: mine.yaml\n")
    Path("recipes/sub/wrong.yaml").write_text("description: [\n")
    Path("recipes/sub/binary.yaml").write_bytes(b"\xff\xfe\x00")
    Path("recipes/plain.yaml").write_text(SMALLEST)
    assert cli.main(["list"]) == 0
    rows = dict([*line.split(maxsplit=1), ""][:2] for line in capsys.readouterr().out.splitlines() if line)
    assert rows["recipes/mine.yaml"] == rows["recipes/heir.yaml"] == "a line of mine"
    assert rows["recipes/plain.yaml"] == ""
    assert rows["recipes/sub/wrong.yaml"].startswith("(broken: recipes/sub/wrong.yaml:2: is not valid YAML")
    assert "not UTF-8" in rows["recipes/sub/binary.yaml"]
    assert "quickstart" in rows


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["fitt", "quickstart"], "did you mean 'fit'?"),
        (
            ["frobnicate"],
            "known: board, check-backend, compare, export, fit, generate, list, pattern, plan, show, stream, sweep, "
            "test, validate",
        ),
        (["fit"], "usage: longnet fit"),
        (["fit", "quickstart", "--model.layers=2"], "keys of the recipe are set without dashes: key.path=value"),
        (["list", "quickstart"], "unrecognized arguments: quickstart"),
        (["--verbose"], "VERB"),
        (["pattern", "quickstart", "length=x"], "length=x: expected a whole number, of tokens"),
        (["pattern", "quickstart", "length=0"], "length is 0"),
        (["pattern", "quickstart", "--output", "a.bmp"], ".png, .pdf, .svg"),
        (["compare", "--against", "days"], "invalid choice: 'days'"),
        (["compare", "nowhere"], "nowhere"),
        (["sweep", "quickstart", "name=a,b"], "name"),
        (["fit", "quikstart"], "did you mean 'quickstart'?"),
        (["validate", "runs/none_of_this_name"], "'runs/none_of_this_name'"),
        (["check-backend", "sdpaa"], "did you mean 'sdpa'?"),
        (["check-backend", "dilated", "dilation_rate=[1]"], "did you mean 'dilation_rates'?"),
        (["check-backend", "dilated", "dilation_rates"], "expected key.path=value"),
        (["check-backend", "window", "imports=[no_such_plugin]"], "no module 'no_such_plugin'"),
    ],
)
def test_the_users_errors_end_with_2_and_a_message(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.startswith("longnet: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_librarys_error_is_a_fault_and_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "run", lambda r: int("not a number"))
    with pytest.raises(ValueError, match="not a number"):
        cli.main(["fit", "quickstart"])


def test_a_fault_exits_with_1_and_a_traceback() -> None:
    program = """
import sys
from longnet_kit import cli, cli_arguments, experiment
experiment.run = lambda r: 1 / 0
sys.exit(cli.main(["fit", "quickstart"]))
"""
    ended = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr
    assert "Traceback" in ended.stderr


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(r: Recipe) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run", interrupt)
    assert cli.main(["fit", "quickstart"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_leaves_early_is_no_fault() -> None:
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([*COMMAND, "list"], env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (cli.NO_READER, "")


@pytest.mark.parametrize("argv", [[], ["--help"], ["fit", "--help"], ["check-backend", "-h"]])
def test_help_is_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    assert "usage: longnet" in capsys.readouterr().out


def test_the_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    shown = capsys.readouterr().out
    assert [verb for verb in cli_arguments.VERBS if f"    {verb}" in shown] == list(cli_arguments.VERBS)


@pytest.mark.parametrize(("verb", "seconds"), [("--help", 0.4), ("list", 1.5)])
def test_it_starts_quickly_and_imports_nothing_heavy(verb: str, seconds: float) -> None:
    times = []
    for _ in range(3):  # the best of three, since tests share their cores
        started = time.perf_counter()
        ended = subprocess.run([*COMMAND, verb], env=ENVIRONMENT, capture_output=True, text=True)
        times.append(time.perf_counter() - started)
        assert ended.returncode == 0
    assert min(times) < seconds
    program = f"import sys; from longnet_kit import cli; cli.main([{verb!r}]); print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert not {"torch", "lightning", "numpy", "omegaconf"} & set(ended.stdout.split())


INTERNAL = {
    "fit": (["fit", "quickstart"], "from longnet_kit import data\ndata.registry.build = broken"),
    "check-backend": (
        ["check-backend", "sdpa"], "from longnet_kit.attention.sdpa import SDPA\nSDPA.__init__ = broken",
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", INTERNAL)
def test_a_value_error_inside_of_the_kit_is_a_fault_with_its_traceback(verb: str) -> None:
    argv, patch = INTERNAL[verb]
    program = f"""
def broken(*_, **__): return int("an internal mistake")
{patch}
import sys
from longnet_kit import cli
sys.exit(cli.main({argv}))
"""
    ended = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" in ended.stderr and "ValueError: invalid literal for int()" in ended.stderr
    assert "longnet: " not in ended.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["plan", "quickstart", "devices=" + "9" * 5000],
        ["pattern", "quickstart", "length=" + "9" * 5000],
        ["validate", "x" * 5000],
        ["export", "x" * 5000, "out.safetensors"],
        ["generate", "x" * 5000, "--prompt", "a"],
    ],
)
def test_names_and_numbers_that_are_too_long_are_the_users_error(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.startswith("longnet: ")
