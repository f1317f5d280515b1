"""Generation: what a whole forward pass would draw, for prompts of any lengths together, and the command around it."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from longnet_kit import cli, terminal, weights
from longnet_kit.inference import network
from longnet_kit.inference.generate import generate
from longnet_kit.inference.network import Trained
from longnet_kit.inference.sampling import Sampling
from tests.trained import EXPORTED

pytestmark = pytest.mark.usefixtures("desk")
PROMPTS = [b"0.25 is", b"0", b"0.713 is number 4\n0.1 is number 5\n0.44 is numb" * 3, b"0.713"]


@pytest.fixture
def tiny() -> Trained:
    return network.load("runs/tiny")


def ids(texts: Sequence[bytes]) -> list[list[int]]:
    return [list(text) for text in texts]


def by_whole_passes(tiny: Trained, prompt: list[int], new: int, sampling: Sampling, seed: int) -> list[int]:
    """The reference: the whole text goes through the network for each token."""
    generator, row = torch.Generator().manual_seed(seed), list(prompt)
    while len(row) < len(prompt) + new and row[len(prompt) :][-1:] != [tiny.tokenizer.eos]:
        with torch.no_grad():
            logits = tiny.network(torch.tensor([row]))[:, -1]
        row += sampling.draw(logits, [generator])
    return row[len(prompt) :]


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(), Sampling(0.5, 20, 0.9)], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_unequal_prompts_give_what_each_gives_alone(tiny: Trained, sampling: Sampling, chunk: int) -> None:
    tiny.network.double()
    together = generate(tiny, ids(PROMPTS), max_new_tokens=45, sampling=sampling, seed=5, chunk=chunk)
    for i, prompt in enumerate(ids(PROMPTS)):
        assert together[i] == by_whole_passes(tiny, prompt, 45, sampling, 5 + i)


def test_a_row_ends_with_the_end_of_text_token_or_when_it_is_told(tiny: Trained) -> None:
    with torch.no_grad():
        tiny.network.embedding.weight[tiny.tokenizer.eos] *= 30  # it is drawn sooner or later
    told: dict[int, list[int]] = {}

    def accept(row: int, token: int) -> bool:
        told.setdefault(row, []).append(token)
        return row != 1 or len(told[row]) < 3

    drawn = generate(tiny, ids(PROMPTS), max_new_tokens=400, accept=accept)
    assert [told[i] for i in range(4)] == drawn
    assert len(drawn[1]) == 3
    ended = [row for i, row in enumerate(drawn) if i != 1]
    assert any(row[-1] == tiny.tokenizer.eos for row in ended)
    assert all(tiny.tokenizer.eos not in row[:-1] for row in drawn)


def test_short_rows_that_have_ended_do_not_slow_long_prompts_down(tiny: Trained, monkeypatch: pytest.MonkeyPatch):
    """A row of 3 tokens ends early; then the other's long prompt is read in chunks again."""
    steps: list[int] = []
    hidden = tiny.network.hidden
    monkeypatch.setattr(tiny.network, "hidden", lambda x, **kw: steps.append(x.shape[1]) or hidden(x, **kw))
    generate(tiny, [[48, 46, 50], list(b"0.1 is number 2\n" * 500)], max_new_tokens=10, chunk=1024)
    assert len(steps) < 3 + 10 + 8000 // 1024 + 10


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1, 257]], {}, "tokens holds 257, and the model's vocabulary is 0 to 256"),
        ([[-1]], {}, "tokens holds -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"chunk": 0}, "chunk is 0"),
        ([[1], [2]], {"seed": 2**63 - 2}, "seed is 9223372036854775806, expected 0 to 9223372036854775805"),
    ],
)
def test_what_cannot_be_continued_is_refused(tiny: Trained, prompts: list, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate(tiny, prompts, **{"max_new_tokens": 5, **options})


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    code = cli.main(["generate", *arguments])
    return code, *capfd.readouterr()


def test_the_same_seed_gives_the_same_text_from_run_and_exported_file(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "0.5 is", "--max-new-tokens", "40"]
    texts = {
        run(capfd, source, *arguments, "--seed", seed)[1]
        for source in ("runs/tiny", "runs/tiny/version_0", EXPORTED, "tiny.yaml")
        for seed in ("3", "3")
    }
    assert len(texts) == 1
    assert run(capfd, "runs/tiny", *arguments, "--seed", "4")[1] not in texts
    code, out, err = run(capfd, "runs/tiny", *arguments, "--seed", "3", "--echo")
    assert code == 0 and out == f"0.5 is{texts.pop()}"
    reads = r"reads runs/tiny/version_0/checkpoints/step_00000004\.ckpt\n"
    assert re.fullmatch(rf"{reads}\d+ tokens after 6 of prompts in [\d.]+ s\n", err)


def test_several_prompts_and_samples_come_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    Path("prompt.txt").write_bytes(b"0.7 is number")
    options = ["--max-new-tokens", "9", "--samples", "2", "--temperature", "0.3", "--echo"]
    code, out, _ = run(capfd, "runs/tiny", "--prompt", "0.5", "--prompt-file", "prompt.txt", *options)
    parts = [part.partition("\n")[2] for part in out.split("--- ")[1:]]
    assert code == 0 and len(parts) == 4
    prompts = ["0.5", "0.5", "0.7 is number", "0.7 is number"]
    assert all(part.startswith(prompt) for part, prompt in zip(parts, prompts, strict=True))
    code, out, _ = run(capfd, "runs/tiny", "--prompt", "0.5", "--prompt-file", "prompt.txt", *options, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for row, part in zip(rows, parts, strict=True):
        assert part == f"{row['prompt']}{row['text']}\n"
        assert row["end"] in ("length", "end_of_text") and row["tokens"] <= 9


def test_a_stop_string_ends_the_text_before_it(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["runs/tiny", "--prompt", "0.5", "--temperature", "0", "--max-new-tokens", "60", "--json"]
    whole = json.loads(run(capfd, *arguments)[1])["text"]
    stop = whole[20:23]
    stopped = json.loads(run(capfd, *arguments, "--stop", "never", "--stop", stop)[1])
    assert stopped["end"] == "stop" and stopped["text"] == whole[: whole.index(stop)]
    assert stopped["tokens"] == whole.index(stop) + 3


def test_a_prompt_far_longer_than_the_training_context(capfd: pytest.CaptureFixture[str], tiny: Trained) -> None:
    text = Path("text.txt").read_bytes() * 2  # 30,000 tokens and more, trained on 32
    Path("long.txt").write_bytes(text)
    options = ["--max-new-tokens", "5", "--chunk", "1000", "--temperature", "0"]
    code, out, err = run(capfd, "runs/tiny", "--prompt-file", "long.txt", *options)
    expected = by_whole_passes(tiny, list(text), 5, Sampling(0), 0)
    assert code == 0 and out == tiny.tokenizer.decode(expected) + "\n"
    assert f"tokens after {len(text):,} of prompts" in err


def test_on_a_terminal_the_bar_leaves_standard_output_alone() -> None:
    """Standard error is a terminal, standard output a file: all text is in the file, and the bar on the terminal."""
    Path("long.txt").write_bytes(Path("text.txt").read_bytes()[:9000])
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "longnet_kit.cli", "generate", "runs/tiny", "--prompt", "0.5"]
    command += ["--prompt-file", "long.txt", "--chunk", "500", "--max-new-tokens", "12", "--seed", "3"]
    shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs)
    told = subprocess.run(command, capture_output=True)
    os.close(theirs)
    assert shown.returncode == told.returncode == 0
    assert shown.stdout == told.stdout and shown.stdout.startswith(b"--- 1 of 2 ---\n")
    assert b"of 9,000 tokens" in os.read(ours, 1 << 20)
    os.close(ours)


def test_prompts_and_texts_do_not_act_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "generate",
        "runs/tiny",
        "--prompt",
        "a\x1b[2J\n\tb",
        "--echo",
        "--seed",
        "3",
        "--max-new-tokens",
        "99",
    ]
    assert cli.main(arguments) == 0
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert plain.startswith("a\x1b[2J\n\tb") and shown.startswith("a\\u001b[2J\n\tb")
    assert shown == terminal.printable(plain)


def test_text_that_the_output_cannot_hold_is_replaced() -> None:
    command = [sys.executable, "-m", "longnet_kit.cli", "generate", "runs/tiny", "--prompt", "é", "--echo"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for option in ([], ["--json"]):
        found = subprocess.run([*command, "--max-new-tokens", "3", *option], env=environment, capture_output=True)
        assert found.returncode == 0, found.stderr
        assert (json.loads(found.stdout)["prompt"] == "é") if option else found.stdout.startswith(b"?")


def test_a_plug_in_is_found_beside_the_exported_file(capfd: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    Path("folder/beside_it.py").write_text("MARK = 1\n")
    with safe_open(EXPORTED, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del metadata[weights.DIGEST]  # of the file as it was exported
    metadata["recipe"] = metadata["recipe"].replace("imports: []", "imports: [beside_it]")
    save_file(tensors, "folder/plug.safetensors", metadata)
    assert run(capfd, "folder/plug.safetensors", "--prompt", "0.1", "--max-new-tokens", "2")[0] == 0
    metadata["recipe"] = metadata["recipe"].replace("beside_it", "no_such_module")
    save_file(tensors, "folder/plug.safetensors", metadata)
    code, _, err = run(capfd, "folder/plug.safetensors", "--prompt", "0.1")
    assert code == 2 and "folder/plug.safetensors" in err and "no_such_module" in err


def test_bytes_that_are_no_text_are_taken_by_a_tokenizer_of_bytes(capfd: pytest.CaptureFixture[str]) -> None:
    Path("raw.bin").write_bytes(b"\xff 0.1\xfe")
    assert run(capfd, "runs/tiny", "--prompt-file", "raw.bin", "--max-new-tokens", "2")[0] == 0
    command = [sys.executable, "-m", "longnet_kit.cli", "generate", "runs/tiny", "--max-new-tokens", "3", "--prompt"]
    found = subprocess.run([*map(os.fsencode, command), b"\xff 0.1"], capture_output=True)
    assert found.returncode == 0, found.stderr.decode()


def test_a_prompt_from_standard_input() -> None:
    command = [sys.executable, "-m", "longnet_kit.cli", "generate", "runs/tiny", "--prompt-file", "-", "--echo"]
    found = subprocess.run([*command, "--max-new-tokens", "3"], input=b"0.123 is", capture_output=True)
    assert found.returncode == 0 and found.stdout.startswith(b"0.123 is")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "there is no prompt; give --prompt TEXT or --prompt-file FILE"),
        (["--prompt", ""], "--prompt 1 is empty"),
        (["--prompt", "a", "--prompt-file", "empty.txt"], "--prompt-file empty.txt is empty"),
        (["--prompt-file", "missing.txt"], "--prompt-file missing.txt cannot be read"),
        (["--prompt-file", "runs"], "--prompt-file runs cannot be read"),
        (["--prompt", "a", "--stop", ""], "--stop is empty"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "a", "--temperature", "warm"], "invalid float value: 'warm'"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0.0"),
        (["--prompt", "a", "--top-k", "0"], "'0': expected a whole number of at least 1"),
        (["--prompt", "a", "--max-new-tokens", "none"], "'none': expected a whole number"),
        (["--prompt", "a", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1, expected 0 to 9223372036854775806"),
        (["--prompt", "a", "--seed", "9" * 30], "seed is 999"),
    ],
)
def test_wrong_arguments_are_told(capfd: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    Path("empty.txt").touch()
    code, out, err = run(capfd, "runs/tiny", *arguments)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err


def test_what_is_no_network_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    Path("other.safetensors").write_bytes(b"no such file")
    for source, words in (
        ("runs/nothing", "no recipe 'runs/nothing': neither a file nor a shipped recipe"),
        ("missing.safetensors", "missing.safetensors does not exist"),
        ("other.safetensors", "other.safetensors is no safetensors file, or is damaged"),
        ("runs/tiny/version_0/checkpoints/step_00000004.ckpt", "is a checkpoint; give the run that it is of"),
    ):
        code, _, err = run(capfd, source, "--prompt", "a")
        assert code == 2, source
        assert words in err


def test_a_cache_that_grows_has_its_limit_told_beforehand(capfd: pytest.CaptureFixture[str]) -> None:
    overrides = ["name=dense", "model.attention.backend=sdpa", "trainer.max_steps=1"]
    assert cli.main(["fit", "tiny.yaml", *overrides]) == 0
    arguments = ["runs/dense", "--prompt", "0.1 is", "--max-new-tokens", "20"]
    assert run(capfd, *arguments)[0] == 0
    code, out, err = run(capfd, *arguments, "--max-cached", "24")
    assert (code, out) == (2, "")
    assert "keeps every token, 24 at most, and holds 0; 25 more do not fit" in err and "--max-cached" in err
