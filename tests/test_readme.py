"""Every command and every example of the README runs."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longnet_kit import recipe, testing

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = ["trainer.max_steps=2", "trainer.limit_val_batches=1", "data.seq_len=64", "data.batch_size=2",
         "trainer.limit_test_batches=1"]  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def block(language: str, words: str) -> str:
    """The block of a language that holds these words."""
    (found,) = (text for text in blocks(language) if words in text)
    return found


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]
PICTURES = {command.split()[-1]: command for command in COMMANDS if command.startswith("tools/longnet pattern ")}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like the clone, with the plug-in example beside it and runs of its own."""
    desk = tmp_path_factory.mktemp("readme")
    for name in ("tools", "recipes", "tests", "README.md", ".venv"):
        (desk / name).symlink_to(ROOT / name)
    (desk / "window.py").write_text(block("python", "class Window("))
    (desk / "window.yaml").write_text(block("yaml", "name: window"))
    (desk / "denoiser.py").write_text(block("python", "class Denoiser"))
    return desk


def run(command: str, desk: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, shell=True, cwd=desk, env=environment, capture_output=True, text=True, timeout=300)


def check_that_it_serves(command: str, desk: Path) -> None:
    """Interrupt it once it says where it listens."""
    process = subprocess.Popen(
        shlex.split(command), cwd=desk, text=True, stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as on a terminal
    )  # fmt: skip
    assert process.stdout is not None
    assert "http://localhost:" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0


@pytest.mark.soak
@pytest.mark.timeout(1800)  # on a busy machine; 3 minutes on an idle one
def test_every_command_runs(desk: Path) -> None:
    """In order, since later commands use earlier runs; training is cut to two small steps."""
    for command in COMMANDS:
        tool = command.split()[0]
        if command in PICTURES.values():
            continue  # they are drawn below
        if command == "tools/longnet board":
            check_that_it_serves(command, desk)
            continue
        if tool == "tools/test":
            command = "tools/test tests/test_readme.py --collect-only"
        elif command.startswith("tools/longnet sweep"):
            command = " ".join([command.replace("512,1024", "32,64"), *SMALL[:2], SMALL[3]])
        elif command.startswith("tools/longnet fit"):
            overrides = list(SMALL)
            if "resume=auto" in command:
                overrides[0] = "trainer.max_steps=4"
            if "recipes/parallel/" in command:
                overrides[2] = "data.seq_len=1024"  # a shard takes segments of 512
            if " tasks/" in command:
                del overrides[2:4]  # their texts are of the length that they are for
            command += " " + " ".join(overrides)
        ended = run(command, desk)
        assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    assert {"quickstart", "wider", "tuned", "mine", "window"} <= {path.name for path in (desk / "runs").iterdir()}


def test_the_line_that_a_run_ends_with_can_be_typed(desk: Path) -> None:
    ended = run(f"tools/longnet fit quickstart name=closing {' '.join(SMALL)}", desk)
    (line,) = re.findall(r"^next +(.*)$", ended.stdout, re.MULTILINE)
    assert line == "tools/longnet test runs/closing/version_0"
    tested = run(line, desk)
    assert tested.returncode == 0, tested.stderr


def test_the_plugin_conforms_and_streams_with_two_methods_more(desk: Path) -> None:
    names = runpy.run_path(str(desk / "window.py"))
    testing.check_backend(names["Window"](size=5))
    assert len([line for line in (desk / "window.py").read_text().splitlines() if line.strip()]) <= 15
    exec(compile(block("python", "class WindowWithCache"), "README.md", "exec"), names)
    checks = testing.check_backend(names["WindowWithCache"](size=5))
    (streams,) = (check for check in checks if "cache" in check.claim)
    assert streams.passed


def test_the_example_of_a_cache_runs(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    assert run(f"tools/longnet fit quickstart name=cached {' '.join(SMALL)}", desk).returncode == 0
    example = block("python", "new_cache(batch_size=1)").replace("runs/quickstart", "runs/cached")
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    loaded = names["model"].new_cache(1)  # type: ignore[attr-defined]
    loaded.load_state_dict(torch.load("cache.pt", weights_only=True))
    assert loaded.position == len("import os\nimport sys\n")


def test_the_source_of_answers_trains(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (desk / "sums.py").write_text(block("python", "class Sums"))
    (desk / "sums.yaml").write_text(
        "name: sums\ntask: in_context\nimports: [sums]\nmodel: {dim: 16, heads: 2}\n"
        "data: {source: sums, seq_len: 64, val_examples: 4}\ntrainer: {max_steps: 2}\n"
    )
    ended = run("tools/longnet fit sums.yaml", desk)
    assert ended.returncode == 0, ended.stderr
    assert "accuracy@2" in ended.stdout


def test_the_recipe_of_own_files_trains(desk: Path) -> None:
    for kind, words in {"spam": "win a prize now ", "ham": "see you at lunch "}.items():
        (desk / "mail" / kind).mkdir(parents=True)
        for i in range(60):
            (desk / "mail" / kind / f"{i}.txt").write_text(words * (i + 1))
    (desk / "mail.yaml").write_text(block("yaml", "name: mail"))
    ended = run(f"tools/longnet fit mail.yaml {SMALL[0]} {SMALL[1]} model.dim=16 model.heads=2", desk)
    assert ended.returncode == 0, ended.stderr
    assert "accuracy" in ended.stdout


def test_the_encoder_of_slides_runs(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    names: dict[str, object] = {}
    exec(compile(block("python", "SlideEncoder("), "README.md", "exec"), names)
    assert names["slides"].shape == (2, 768) and names["by_layer"].shape == (13, 2, 768)  # type: ignore[attr-defined]


def test_a_run_goes_to_hugging_face(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    assert run(f"tools/longnet fit quickstart name=pushed {' '.join(SMALL)}", desk).returncode == 0
    names: dict[str, object] = {}
    exec(compile(block("python", "from_run(").replace("runs/quickstart", "runs/pushed"), "README.md", "exec"), names)
    assert names["text"].shape == (1, len("import os\n") + 20)  # type: ignore[attr-defined]
    assert names["loss"].isfinite()  # type: ignore[attr-defined]


def test_the_python_example_runs(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    names: dict[str, object] = {}
    exec(compile(block("python", "attn = attention.build"), "README.md", "exec"), names)
    assert names["out"].shape == names["q"].shape  # type: ignore[attr-defined]
    assert len(names["task"].model.attention_backends) == 2  # type: ignore[attr-defined]


@pytest.mark.timeout(600)
def test_the_lightning_example_trains_on_two_processes(desk: Path) -> None:
    ended = run(".venv/bin/python denoiser.py", desk)
    assert ended.returncode == 0, ended.stderr
    assert "MEMBER: 2/2" in ended.stderr + ended.stdout and "max_epochs=2` reached" in ended.stderr + ended.stdout


def test_the_lines_that_divide_a_sequence_are_a_recipes(desk: Path) -> None:
    (desk / "divided.yaml").write_text(
        "name: divided\nextends: recipes/quickstart.yaml\n" + block("yaml", "devices: 8")
    )
    assert recipe.load(desk / "divided.yaml").strategy.sequence_parallel_size == 4


def test_the_pictures_are_what_the_commands_draw(desk: Path) -> None:
    assert set(PICTURES) == {"pattern.png", "heads.png"}
    for name, command in PICTURES.items():
        assert run(command, desk).returncode == 0
        drawn, shown = (
            np.asarray(Image.open(folder / name).convert("RGB")) for folder in (desk, ROOT / "tools/figures")
        )
        np.testing.assert_array_equal(drawn, shown)
