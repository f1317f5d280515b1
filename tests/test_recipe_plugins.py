"""Imports of a recipe: where plug-ins are found, and what is told of those that fail."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from longnet_kit import cli, plugins, recipe, runs
from tests.recipes import SMALLEST, refusal, write

PLUGIN = """
from longnet_kit import attention

@attention.register({name!r})
class Mine(attention.AttentionBackend):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
"""


@pytest.fixture
def keep_sys_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("keep_sys_path")
def test_imports_are_found_beside_the_recipe_and_again_from_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, PLUGIN.format(name="beside"), "lab/plugin_beside.py")
    monkeypatch.chdir(tmp_path)
    text = SMALLEST + "imports: [plugin_beside]\nmodel: {attention: {backend: beside}}\n"
    r = recipe.load(write(tmp_path, text, "lab/r.yaml"))
    assert r.model.attention == {"backend": "beside", "size": 3}
    saved = tmp_path / "runs" / "x" / "recipe.yaml"
    saved.parent.mkdir(parents=True)
    recipe.save(r, saved)
    program = "from longnet_kit import recipe; print(recipe.load('runs/x/recipe.yaml').model.attention)"
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": ""}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.stdout.strip() == "{'backend': 'beside', 'size': 3}", ended.stderr


@pytest.mark.usefixtures("keep_sys_path")
def test_imports_are_found_in_the_working_directory_then_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("recipes", "here", "path"):
        write(tmp_path, PLUGIN.format(name=f"{place}_of_three"), f"{place}/plugin_everywhere.py")
        write(tmp_path, PLUGIN.format(name=f"{place}_of_two"), f"{place}/plugin_{place}.py")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "path")
    text = SMALLEST + "imports: [plugin_everywhere, plugin_here, plugin_path]\nmodel: {attention: {backend: %s}}\n"
    r = recipe.load(write(tmp_path, text % "recipes_of_three", "recipes/r.yaml"))
    assert r.imports == [f"{tmp_path / 'recipes'}/plugin_everywhere", "plugin_here", "plugin_path"]
    assert "path_of_two" in refusal(tmp_path / "recipes" / "r.yaml", "model.attention.backend=nothing_like_it_at_all")


@pytest.mark.usefixtures("keep_sys_path")
def test_imports_of_an_extended_recipe_are_found_beside_it(tmp_path: Path) -> None:
    write(tmp_path, PLUGIN.format(name="low_down"), "low/plugin_low_down.py")
    write(tmp_path, SMALLEST + "imports: [plugin_low_down]\n", "low/low.yaml")
    path = write(tmp_path, "extends: low/low.yaml\nmodel: {attention: {backend: low_down}}\n")
    assert recipe.load(path).model.attention["backend"] == "low_down"


@pytest.mark.usefixtures("keep_sys_path")
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 1\nraise RuntimeError('out of\\ntune')", ":2: tune"),
        ("x = 1\n1 / 0", ":2: ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError"),
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("raise SystemExit(3)", ":1: SystemExit: 3"),
        (PLUGIN.format(name="sdpa"), "attention backend 'sdpa' is already registered"),
    ],
)
def test_a_plugin_that_fails_is_told_with_its_line(tmp_path: Path, code: str, expected: str) -> None:
    module = f"plugin_fails_{abs(hash(code))}"
    plugin = write(tmp_path, code, f"{module}.py")
    told = refusal(write(tmp_path, SMALLEST + f"imports:\n  - {module}\n"))
    assert f"imports[0] ({tmp_path / 'r.yaml'}:4): importing {module!r} failed: {plugin}:" in told
    assert expected in told


def test_a_missing_plugin_is_told_with_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, SMALLEST + "imports: [nowhere_to_be_found]\n", "lab/r.yaml")
    monkeypatch.chdir(tmp_path)
    told = refusal(path)
    assert "'nowhere_to_be_found'" in told
    assert f"{tmp_path / 'lab'}, {tmp_path}, nor on sys.path" in told
    assert "write window" in refusal(path, "imports=[window.py]")


@pytest.mark.usefixtures("keep_sys_path")
def test_two_plugins_of_one_name_are_not_mixed_up(tmp_path: Path) -> None:
    for place in ("one", "two"):
        write(tmp_path, PLUGIN.format(name=f"twin_{place}"), f"{place}/plugin_twin.py")
        write(tmp_path, SMALLEST + "imports: [plugin_twin]\n", f"{place}/r.yaml")
    recipe.load(tmp_path / "one" / "r.yaml")
    recipe.load(tmp_path / "one" / "r.yaml")
    told = refusal(tmp_path / "two" / "r.yaml")
    assert str(tmp_path / "one" / "plugin_twin.py") in told
    assert str(tmp_path / "two" / "plugin_twin.py") in told


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_sys_path: None) -> Path:
    """A run outside of the working directory, whose recipe imports a module that leaves a trace."""
    run = tmp_path / "foreign" / "version_0"
    write(run, SMALLEST + "imports: [a_foreign_module]\n", runs.RECIPE)
    write(run, f"open({str(tmp_path / 'trace')!r}, 'a').close()\n", "a_foreign_module.py")
    write(run, "nothing\n", "checkpoints/step_00000001.ckpt")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delitem(sys.modules, "a_foreign_module", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setenv(plugins._ACCEPTED, "")
    return run


VERBS = (
    "validate {}", "test {}", "export {} out.safetensors", "generate {} --prompt a", "stream {} ../trace",
    "fit ../mine.yaml resume={}",
)  # fmt: skip


@pytest.mark.parametrize("line", VERBS)
def test_a_foreign_run_imports_nothing_unless_it_is_trusted(
    line: str, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, SMALLEST, "mine.yaml")
    arguments = line.format(foreign).split()
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert f"{foreign} is outside the working directory, and its recipe runs the code of a_foreign_module" in told
    assert "--trust" in told
    assert not (tmp_path / "trace").exists()
    cli.main([*arguments, "--trust"])  # its checkpoint is none, which is found later
    assert (tmp_path / "trace").exists()
    assert not plugins._TRUSTS.get(), "the next command is not trusted"


def test_a_foreign_file_imports_nothing_unless_it_is_trusted(foreign: Path, tmp_path: Path) -> None:
    text = (foreign / runs.RECIPE).read_text()
    with pytest.raises(ValueError, match="outside the working directory"):
        recipe.loads(text, foreign / "exported.safetensors")
    assert not (tmp_path / "trace").exists()
    with plugins.trusted():
        recipe.loads(text, foreign / "exported.safetensors")
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("place", ["a folder further down", "the folder above", "a link"])
def test_what_is_in_the_working_directory_is_the_users_own(
    place: str, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "a link":
        Path("linked").symlink_to(foreign)
        recipe.load_saved(Path("linked"))
    else:
        is_above = place == "the folder above"
        monkeypatch.chdir(foreign.parent if is_above else tmp_path)
        recipe.load_saved(Path("version_0") if is_above else foreign)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(("answer", "runs_it"), [("y\n", True), ("\n", False), ("no\n", False), ("", False)])
def test_on_a_terminal_the_user_is_asked_once(
    answer: str, runs_it: bool, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    answers = io.StringIO(answer)
    monkeypatch.setattr(answers, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", answers)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for _ in range(2):
        if runs_it:
            recipe.load_saved(foreign)
        else:
            with pytest.raises(ValueError, match="runs the code of a_foreign_module"):
                recipe.load_saved(foreign)
    assert capsys.readouterr().err.count("a_foreign_module; go on? [y/N] ") == (1 if runs_it else 2)
    assert (tmp_path / "trace").exists() == runs_it
