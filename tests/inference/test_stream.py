"""Reading files as one sequence: the whole sequence's losses, resumed anywhere, told in all places."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy

from longnet_kit import cli, recipe, weights
from longnet_kit.inference import network
from longnet_kit.inference import stream as module
from longnet_kit.inference.score import Score
from longnet_kit.inference.stream import Result, stream
from tests.trained import EXPORTED

pytestmark = pytest.mark.usefixtures("desk")
N = 3000
CHUNK = 200


@pytest.fixture(autouse=True)
def text(desk: Path) -> bytes:
    """Two files that come to N bytes and two ends of text."""
    content = (desk / "text.txt").read_bytes()[:N]
    Path("one.txt").write_bytes(content[:1234])
    Path("two.txt").write_bytes(content[1234:])
    return content


def read(**options: Any) -> Result:
    return stream("runs/tiny", ["one.txt", "two.txt"], **{"chunk": CHUNK, **options})


def expected_nats(text: bytes, reach: int | None = None) -> torch.Tensor:
    """-log p of every token but the first, from one pass over all of them in float64."""
    ids = torch.tensor([[*text[:1234], 256, *text[1234:], 256]])
    model = network.load("runs/tiny", reach=reach).network.double()
    with torch.no_grad():
        return cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")


def table_of(result: Result) -> list[dict[str, str]]:
    with (result.directory / "curve.csv").open() as file:
        return list(csv.DictReader(file))


def told(result: Result) -> Any:
    """All that a stream measured, but times and memory."""
    rows = [(row["step"], row.get("bits_per_byte"), row["bits_per_byte_overall"]) for row in table_of(result)]
    return result.tokens, result.score.state_dict(), rows


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("chunk", [1, 77, 10_000])
def test_the_losses_are_those_of_the_whole_sequence(text: bytes, chunk: int, extend: bool) -> None:
    result = read(chunk=chunk, extend=extend)
    nats = expected_nats(text, N + 2 if extend else None)
    assert result.tokens == N + 2
    assert result.score.total.tokens == N + 1
    assert result.score.total.text_bytes == N - 1  # the first token is not predicted
    assert result.score.total.nats == pytest.approx(float(nats.sum()), rel=1e-6)
    for i, decade in enumerate(result.score.decades):
        own = nats[10**i - 1 : 10 ** (i + 1) - 1]  # nats[p - 1] is of the token at position p
        assert decade.tokens == len(own)
        assert decade.nats == pytest.approx(float(own.sum()), rel=1e-5)
    summary = json.loads((result.directory / "summary.json").read_text())
    bits = float(nats.sum()) / math.log(2) / (N - 1)
    assert summary["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert summary["tokens"] == N + 2 and summary["status"] == "finished" and summary["readings"] == 1


def test_extending_changes_what_far_tokens_see(text: bytes) -> None:
    near, far = expected_nats(text), expected_nats(text, N + 2)
    assert near[0] == far[0]
    assert (near[100:] - far[100:]).abs().max() > 1e-6


def test_learned_branches_are_not_extended() -> None:
    r = recipe.load("tiny.yaml", ["model.attention.mixing=learned"])
    with pytest.raises(ValueError, match="mixing: learned, a trained weight per branch, of which added branches have"):
        network._further_branches(r, 1000)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("chunks", [0, 1, 2, 71, 149, 150])
def test_a_stream_that_ended_anywhere_goes_on_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch, chunks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chunks of 20, so that points of the curve are further apart than saves."""
    first = read(output="undisturbed", chunk=20)
    undisturbed = told(first)
    take, count = module._Reading._read, 0

    def dying(self: Any, *arguments: Any) -> None:
        nonlocal count
        if count == chunks:
            raise Stopped
        count += 1
        take(self, *arguments)

    with monkeypatch.context() as patched, contextlib.suppress(Stopped):
        save = module.StreamFiles.save
        patched.setattr(module.StreamFiles, "save", lambda *arguments: 0 * save(*arguments))  # in no time: always due
        patched.setattr(module, "SAVE_EVERY", 0.0)
        patched.setattr(module._Reading, "_read", dying)
        read(output="disturbed", chunk=20)
    capsys.readouterr()
    again = read(output="disturbed", chunk=20)
    out = capsys.readouterr().out
    saved = min(chunks, 150) * 20
    assert (f"goes on     after {saved:,} tokens" in out) == (chunks > 0)
    assert told(again) == undisturbed
    once_more = read(output="disturbed", chunk=20)  # when it has finished
    assert told(once_more) == undisturbed and once_more.seconds > 0.1 * first.seconds


def test_more_tokens_go_on_from_fewer(text: bytes) -> None:
    undisturbed = told(read(output="undisturbed", tokens=2500))
    for tokens in (300, 777, 778, 1400):
        result = read(output="grown", tokens=tokens)
        assert result.tokens == tokens and result.score.total.tokens == tokens - 1
    assert told(read(output="grown", tokens=2500))[:2] == undisturbed[:2]
    with pytest.raises(ValueError, match=r"--tokens 800: 2,400 were read into grown before"):
        read(output="grown", tokens=800)
    assert json.loads(Path("grown/summary.json").read_text())["tokens"] == 2500


def test_files_are_repeated_on_demand_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    result = read(tokens=8000, repeat=True)
    assert result.tokens == 8000
    assert "the files were read 3 times" in capsys.readouterr().out
    assert read(tokens=8000, output="short").tokens == N + 2
    with pytest.raises(ValueError, match="--repeat never ends by itself; say where to end with --tokens"):
        read(repeat=True)


def test_files_that_end_early_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    read(tokens=5000)
    assert "3,002 tokens as one sequence; there the files end, 5,000 were asked for" in capsys.readouterr().out


def test_an_error_in_a_later_file_keeps_what_was_read(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    for _ in range(2):
        with pytest.raises(ValueError, match="bad.jsonl, line 2: 'text' is 3, expected text"):
            stream("runs/tiny", ["one.txt", "bad.jsonl"], chunk=CHUNK, output="out")
    assert "goes on     after 1,200 tokens" in capsys.readouterr().out


def test_a_full_disk_does_not_end_a_stream(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    undisturbed = told(read(output="undisturbed"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        assert told(read(output="out")) == undisturbed
    assert "note: out: state.pt cannot be written (No space left on device); reading goes on" in capsys.readouterr().out
    assert not list(Path("out").glob("*state*")) and told(read(output="out")) == undisturbed


def test_what_is_read_and_with_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    result = read()
    out = capsys.readouterr().out
    assert "runs/tiny/version_0/checkpoints/step_00000004.ckpt, step 4" in out
    assert "2 branches as trained: a token sees its segment, of 32 tokens at most" in out
    assert "one.txt, two.txt (3,000 bytes) as one sequence" in out
    assert f"results in  {result.directory}" in out and result.directory.is_relative_to("runs/tiny/version_0/streams")
    extended = read(extend=True)
    out = capsys.readouterr().out
    assert "2 branches as trained, up to 32 tokens, and 7 more by doubling (w, r), up to 4,096" in out
    assert extended.directory != result.directory
    added = json.loads((extended.directory / "summary.json").read_text())["added_branches"]
    assert added == [[32 * 2**i, 2 * 2**i] for i in range(1, 8)]


def test_the_same_command_finds_its_own_results(text: bytes) -> None:
    first = read().directory
    assert read().directory == first
    assert stream(EXPORTED, ["one.txt"], chunk=CHUNK).directory.parent == Path("tiny_streams")
    Path("one.txt").write_bytes(text)
    assert read().directory != first


def test_tensorboard_shows_the_curve() -> None:
    """Of a stream in two goes, each point once."""
    read(chunk=100, tokens=1750)
    time.sleep(1.1)  # event files are ordered by the second of their names
    result = read(chunk=100)
    events = EventAccumulator(str(result.directory), size_guidance={"scalars": 0})
    events.Reload()
    rows = table_of(result)
    assert [int(row["step"]) for row in rows] == [e.step for e in events.Scalars("stream/seconds")]
    assert int(rows[-1]["step"]) == N + 2
    for tag in ("bits_per_byte", "bits_per_byte_overall", "tokens_per_second", "memory", "seconds"):
        seen = [e.value for e in events.Scalars(f"stream/{tag}")]
        assert seen == pytest.approx([float(row[tag]) for row in rows if row[tag]], rel=1e-6)
    by_decade = events.Scalars("stream/bits_per_byte_from_position")
    assert [e.step for e in by_decade] == [1, 10, 100, 1000]
    assert [e.value for e in by_decade] == pytest.approx([d.bits_per_byte for d in result.score.decades])
    assert float(rows[-1]["bits_per_byte_overall"]) == pytest.approx(result.score.total.bits_per_byte)


@pytest.mark.parametrize(("tokens", "has_own"), [(1990, True), (1960, False), (1951, False), (30, True)])
def test_a_last_point_of_few_tokens_has_no_bits_per_byte_of_its_own(tokens: int, has_own: bool) -> None:
    """Points are 65 tokens apart there; one after much fewer would read like a change of the loss."""
    result = read(chunk=65, tokens=tokens)
    last = table_of(result)[-1]
    assert int(last["step"]) == tokens
    assert bool(last.get("bits_per_byte")) is has_own
    assert float(last["bits_per_byte_overall"]) == pytest.approx(result.score.total.bits_per_byte)


def test_a_last_decade_of_few_tokens_is_in_the_table_alone() -> None:
    result = read(tokens=1100)
    assert [d.tokens for d in result.score.decades] == [9, 90, 900, 100]
    summary = json.loads((result.directory / "summary.json").read_text())
    own = [key for key in summary if key.startswith("bits_per_byte_from_")]
    assert own == [f"bits_per_byte_from_{first}" for first in (1, 10, 100)]


def test_points_add_up_to_the_whole(text: bytes) -> None:
    rows = table_of(read(chunk=50))
    ends = [0, *(int(row["step"]) for row in rows)]
    nats = expected_nats(text)
    for start, end, row in zip(ends[:-1], ends[1:], rows, strict=True):
        own = nats[start : min(end, N + 1)]
        text_bytes = len(own) - sum(start < p <= end for p in (1234, N + 1))  # without ends of text
        if text_bytes and (end < N + 2 or end - start >= end // 32 / 2):
            assert float(row["bits_per_byte"]) == pytest.approx(float(own.sum()) / math.log(2) / text_bytes, rel=1e-4)
        else:
            assert not row["bits_per_byte"]
    assert len(rows) > 20


def test_another_stream_s_folder_is_refused() -> None:
    read(output="out")
    assert stream(EXPORTED, ["one.txt", "two.txt"], chunk=CHUNK, output="out").tokens == N + 2  # the same weights
    with safe_open(EXPORTED, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["norm.bias"][0] += 1e-3
    del metadata[weights.DIGEST]  # of the file as it was exported
    save_file(tensors, "other.safetensors", metadata)
    for options, words in (
        ({"extend": True}, "other attention"),
        ({"files": ["one.txt"]}, "other files"),
        ({"source": "other.safetensors"}, "other weights"),
    ):
        with pytest.raises(ValueError, match=f"out holds a stream of {words}; name another folder with --output"):
            arguments = {"source": "runs/tiny", "files": ["one.txt", "two.txt"], "chunk": CHUNK, "output": "out"}
            stream(**(arguments | options))


@pytest.mark.parametrize("content", [b"", b"damaged", None])
def test_a_damaged_state_is_told(content: bytes | None) -> None:
    read(output="out")
    state = Path("out/state.pt")
    state.write_bytes(state.read_bytes()[:-500] if content is None else content)
    with pytest.raises(ValueError, match=r"out/state.pt is damaged \(.*\); delete it to read from the beginning"):
        read(output="out")
    state.unlink()
    assert read(output="out").tokens == N + 2


def test_a_bit_flipped_where_an_archive_has_no_checksum_of_its_own_is_told() -> None:
    read(output="out")
    state = Path("out/state.pt")
    content = bytearray(state.read_bytes())
    content[content.index(b"ZZZZ")] ^= 1  # torch's padding
    state.write_bytes(content)
    with pytest.raises(ValueError, match=r"out/state.pt is damaged \(.*\); delete it to read from the beginning"):
        read(output="out")
    assert state.read_bytes() == content, "nothing is lost"


def test_a_limit_that_has_no_effect_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    read(max_cached=5)
    assert "note: --max-cached has no effect: the cache of this model does not grow" in capsys.readouterr().out


def test_one_token_has_nothing_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert read(tokens=1).score.total.tokens == 0
    assert "no bits per byte" in capsys.readouterr().out


def test_branches_reach_over_text_whose_length_is_not_known_beforehand() -> None:
    Path("bad.jsonl").write_bytes(b'{"text": "' + b"\xff" * 2000 + b'"}\n')  # three bytes for each when replaced
    result = stream("runs/tiny", ["bad.jsonl"], errors="replace", extend=True, chunk=CHUNK)
    added = json.loads((result.directory / "summary.json").read_text())["added_branches"]
    assert max(w for w, _ in added) >= result.tokens == 6001
    result = read(tokens=10**9, extend=True)  # no more than there is
    added = json.loads((result.directory / "summary.json").read_text())["added_branches"]
    assert max(w for w, _ in added) == 4096


def test_events_of_a_stream_that_was_killed_before_its_first_save_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    take, count = module._Reading._read, 0

    def dying(self: Any, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise Stopped
        take(self, *arguments)

    with monkeypatch.context() as patched, contextlib.suppress(Stopped):
        patched.setattr(module._Reading, "_read", dying)
        read(output="out")
    time.sleep(1.1)  # event files are ordered by the second of their names
    events = EventAccumulator(str(read(output="out").directory), size_guidance={"scalars": 0})
    events.Reload()
    steps = [e.step for e in events.Scalars("stream/seconds")]
    assert steps == sorted(set(steps)) and steps[-1] == N + 2


def test_results_are_gone_while_a_stream_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = read(output="out", tokens=500).directory / "summary.json"
    assert summary.is_file()
    take = module._Reading._read

    def looking(self: Any, *arguments: Any) -> None:
        assert not summary.exists()
        take(self, *arguments)

    monkeypatch.setattr(module._Reading, "_read", looking)
    read(output="out")
    assert json.loads(summary.read_text())["tokens"] == N + 2


def test_weights_that_are_spoilt_are_told() -> None:
    loaded = network.load("runs/tiny")
    with torch.no_grad():
        loaded.network.norm.bias[0] = math.nan
    with pytest.MonkeyPatch.context() as patched, pytest.raises(ValueError, match="position 1 is not finite"):
        patched.setattr(module.network, "load", lambda *_, **__: loaded)
        read()


def test_state_and_cache_do_not_grow_with_the_text() -> None:
    small, large = (read(output=f"out{n}", tokens=n, repeat=True) for n in (1000, 60_000))
    sizes = [(result.directory / "state.pt").stat().st_size for result in (small, large)]
    assert abs(sizes[0] - sizes[1]) < 2000
    summaries = [json.loads((result.directory / "summary.json").read_text()) for result in (small, large)]
    assert summaries[0]["cache"] == summaries[1]["cache"] == 2 * 2 * (8 + 16) * 2 * 8 * 4


def test_attention_that_keeps_every_token_has_its_limit_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "tiny.yaml", "name=dense", "model.attention.backend=sdpa", "trainer.max_steps=1"]) == 0
    files = ["one.txt", "two.txt"]
    assert stream("runs/dense", files, chunk=CHUNK).tokens == N + 2
    assert "a cache that keeps every token, 65,536 at most" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"keeps every token, 1,000 at most, and holds 0; 3,002 more.*--max-cached"):
        stream("runs/dense", files, chunk=CHUNK, max_cached=1000, output="out")
    with pytest.raises(ValueError, match=r"holds 0; 2,000 more do not fit"):
        stream("runs/dense", files, chunk=CHUNK, max_cached=1000, tokens=2000, output="out")
    assert not Path("out").exists(), "nothing was begun"
    Path("records.jsonl").write_text(json.dumps({"text": "x" * 1500}))  # whose tokens are not known beforehand
    for _ in range(2):
        with pytest.raises(ValueError, match=r"keeps every token, 1,000 at most, and holds 1,000; 200 more"):
            stream("runs/dense", ["records.jsonl"], chunk=CHUNK, max_cached=1000, output="out")
        assert "saved       after 1,000 tokens; the same command goes on from there" in capsys.readouterr().out
    assert stream("runs/dense", ["records.jsonl"], chunk=CHUNK, output="out").tokens == 1501
    assert "goes on     after 1,000 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--extend adds branches to the attention backend dilated.*has sdpa"):
        stream("runs/dense", files, extend=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.txt"], "FILES: missing.txt does not exist"),
        ([], "FILES is empty"),
        (["empty.txt"], "empty.txt: there is no text in it"),
        (["empty.jsonl"], "empty.jsonl: there is no text in it"),
        (["one.txt", "/dev/null"], "FILES: /dev/null is no regular file, and it is read more than once"),
        (["one.txt", "--tokens", "1" + "0" * 16], "expected 1 to 1,000,000,000,000,000"),
        (["one.txt", "--tokens", "0"], "'0': expected a whole number of at least 1"),
        (["one.txt", "--repeat"], "--repeat never ends by itself"),
        (["one.txt", "--output", "one.txt"], "one.txt: cannot be written"),
        (["one.txt", "--chunk", "-3"], "'-3': expected a whole number"),
    ],
)
def test_wrong_arguments_are_told(capfd: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    Path("empty.txt").touch()
    Path("empty.jsonl").write_text('{"text": ""}')
    assert cli.main(["stream", "runs/tiny", *arguments]) == 2
    err = capfd.readouterr().err
    assert words in err and "Traceback" not in err


@given(first=st.integers(1, 1200), count=st.integers(0, 12_000))
def test_each_prediction_counts_in_its_decade(first: int, count: int) -> None:
    score = Score()
    nats = np.arange(first, first + count, dtype=np.float64)
    score.add(first, nats, 2 * nats)
    for i, decade in enumerate(score.decades):
        own = nats[(nats >= 10**i) & (nats < 10 ** (i + 1))]
        assert (decade.nats, decade.text_bytes, decade.tokens) == (own.sum(), 2 * own.sum(), len(own))
    assert score.total.tokens == count
    assert Score.of_state(json.loads(json.dumps(score.state_dict()))) == score
