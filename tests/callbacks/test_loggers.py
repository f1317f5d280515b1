"""What reaches TensorBoard besides scalars, and the logger that remembers."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata

from longnet_kit import attention
from longnet_kit.callbacks import (
    AttentionPattern,
    Board,
    BranchWeights,
    Consumption,
    FinalValidation,
    LastValues,
    LossByPosition,
    PerplexityByContext,
    Throughput,
    attention_figures,
    points,
)
from longnet_kit.callbacks.board import LAYOUT, flatten
from longnet_kit.callbacks.consumption import VS_TOKENS, peak_memory
from longnet_kit.report import figures, pattern_figures
from tests.tasks.tiny import BATCH, SEQ_LEN, Data, logged, task, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
DILATED = {"backend": "dilated", "segment_lengths": [4, 16], "dilation_rates": [1, 2]}


def board(directory: Path) -> Board:
    return Board(directory / "name" / "version_0")


def events(directory: Path) -> EventAccumulator:
    return EventAccumulator(
        str(directory / "name" / "version_0"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    ).Reload()


def test_scalars_and_figures_are_at_their_steps(tmp_path: Path) -> None:
    last = LastValues()
    watching = [
        Throughput(),
        Consumption(),
        AttentionPattern(),
        BranchWeights(),
        LossByPosition(),
        PerplexityByContext(),
    ]
    run = trainer(tmp_path, *watching, loggers=[board(tmp_path), last], val_check_interval=2)
    run.fit(task(attention=DILATED, eval_contexts=[4, 8]), datamodule=Data())
    found = events(tmp_path)
    table = logged(tmp_path)
    scalars = {"train/loss", "train/grad_norm", "train/lr", "train/tokens_per_second", "train/mfu"}
    scalars |= {"train/tokens", "train/flops", "train/seconds", "train/peak_memory"}
    scalars |= {"val/loss", "val/perplexity", "val/bits_per_byte", "val/perplexity@4", "val/perplexity@8"}
    assert set(found.Tags()["scalars"]) - {f"vs_tokens/{tag}" for tag in VS_TOKENS} == scalars == set(table)
    assert scalars == set(last.values)
    flops = 3 * run.model.model.flops(SEQ_LEN)
    assert table["train/flops"] == {step: pytest.approx(step * BATCH * flops) for step in table["train/tokens"]}
    for tag in scalars:
        read = {event.step: event.value for event in found.Scalars(tag)}
        assert read == pytest.approx(table[tag], rel=1e-6)
        assert last.values[tag] == pytest.approx(table[tag][4])
    for tag in VS_TOKENS:
        read = {event.step: event.value for event in found.Scalars(f"vs_tokens/{tag}")}
        assert read == pytest.approx({step * BATCH * SEQ_LEN: x for step, x in table[tag].items()}, rel=1e-6)
    at_validations = ("val/loss_by_position", "val/perplexity_by_context", "val/branch_weights")
    for tag, steps in {"attention_pattern": [0], **{tag: [2, 4] for tag in at_validations}}.items():
        images = found.Images(tag)
        assert [image.step for image in images] == steps
        pixels = np.asarray(Image.open(io.BytesIO(images[0].encoded_image_string)))
        assert pixels.shape[2] == 3 and pixels.std() > 5


def test_no_figure_where_nothing_was_measured(tmp_path: Path) -> None:
    watching = [BranchWeights(), LossByPosition(), PerplexityByContext()]
    run = trainer(None, *watching, loggers=[board(tmp_path)], limit_val_batches=0)
    run.fit(task(attention=DILATED), datamodule=Data())
    dense = trainer(None, *watching[:1], watching[2], loggers=[board(tmp_path)], val_check_interval=2)
    dense.fit(task(), datamodule=Data())  # no branches, and one context alone
    assert not events(tmp_path).Tags()["images"]


def test_the_shares_are_those_of_the_first_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[np.ndarray] = []

    def keep(shares: np.ndarray, branches: list[tuple[int, int]]) -> Figure:
        assert branches == [(4, 1), (16, 2)]
        drawn.append(shares)
        return Figure()

    monkeypatch.setattr(figures, "branch_weights", keep)
    ours = task(attention=DILATED, layers=2, eval_contexts=[8])
    trainer(None, BranchWeights(), loggers=[board(tmp_path)], num_sanity_val_steps=0).validate(
        ours, Data(), verbose=False
    )
    expected: list[torch.Tensor] = []
    for backend in ours.model.attention_backends:
        assert backend.watch is None
        backend.watch = lambda q, k, *rest, b=backend: expected.append(
            b.branch_weights(q, k, *rest).double().mean((1, 2, 3))
        )
    with torch.no_grad():
        ours.model(next(iter(Data().val_dataloader()))["tokens"])
    (shares,) = drawn
    np.testing.assert_allclose(shares, torch.stack(expected).numpy(), rtol=1e-12)
    assert not np.allclose(shares[0], shares[1])
    np.testing.assert_allclose(shares.sum(1), 1)


def test_padding_has_no_part_in_the_shares() -> None:
    backend = attention.build(DILATED)
    assert isinstance(backend, attention.AttentionBackend)
    q, k = torch.randn(2, 1, 16, 2, 4)
    real = torch.arange(16)[None] < 5
    watching = BranchWeights()
    watching._look(0, backend, q, k, True, real)
    *shares, count = watching._sums[0].tolist()
    assert count == 5 * 2
    expected = backend.branch_weights(q[:, :5], k[:, :5]).sum((1, 2, 3))  # padding on the right changes nothing
    assert shares == pytest.approx(expected.tolist(), rel=1e-5)


def test_figures_are_drawn_of_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, tuple[Any, ...]] = {}

    def keep(name: str) -> Any:
        def draw(*arguments: Any, **named: Any) -> Figure:
            asked[name] = (*arguments, *named.values())
            return Figure()

        return draw

    for module, name in (
        (figures, "perplexity_by_context"),
        (figures, "loss_by_position"),
        (pattern_figures, "pattern_figure"),
    ):
        monkeypatch.setattr(module, name, keep(name))
    monkeypatch.setattr(attention_figures, "DRAWN", 12)
    ours = task(attention=DILATED, eval_contexts=[4, 8], causal=False)
    watching = [LossByPosition(), PerplexityByContext(), AttentionPattern()]
    run = trainer(tmp_path, *watching, loggers=[board(tmp_path)], val_check_interval=2)
    run.fit(ours, datamodule=Data())
    table = logged(tmp_path)
    perplexities = {4: "val/perplexity@4", 8: "val/perplexity@8", SEQ_LEN: "val/perplexity"}
    (drawn,) = asked["perplexity_by_context"]
    assert drawn == pytest.approx({length: table[tag][4] for length, tag in perplexities.items()}, rel=1e-6)
    assert asked["pattern_figure"] == (ours.model.attention_backends[0].pattern, 12, 2, False, "")
    ours.loss_by_position, ours.tokens_by_position = (
        torch.ones(4),
        torch.ones(4, dtype=torch.int64),
    )  # where neighbours of a long context share a mean
    for callback in watching[:1]:
        callback.on_validation_end(run, ours)
    losses, tokens, shared = asked["loss_by_position"]
    assert len(losses) == len(tokens) == 4 and shared == SEQ_LEN / 4


def test_nobody_watches_after_a_failed_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = task(attention=DILATED)
    monkeypatch.setattr(ours.model.blocks[0].attention.norm, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer(None, BranchWeights(), loggers=[board(tmp_path)]).validate(ours, Data(), verbose=False)
    assert ours.model.attention_backends[0].watch is None


def test_hyper_parameters_start_no_curve_and_name_no_columns(tmp_path: Path) -> None:
    logger = board(tmp_path)
    model = {"dim": 8, "attention": {"segment_lengths": [2, 4]}}
    logger.describe({"name": "x", "model": model, "resume": None}, "name: x\n")
    running = events(tmp_path)
    assert "_hparams_/session_end_info" not in running.summary_metadata  # which TensorBoard shows as running
    logger.finalize("success")
    found = events(tmp_path)
    assert not found.Tags()["scalars"]
    start = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.attention.segment_lengths" in start and b"2, 4" in start
    assert "_hparams_/experiment" not in found.summary_metadata
    for name, words in {"environment": ("torch", "Python"), "recipe": ("```yaml\nname: x\n```",)}.items():
        text = found.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        assert all(word in text for word in words)
    assert not (tmp_path / "name" / "version_0" / "hparams.yaml").exists()


@pytest.mark.parametrize(("status", "expected"), [("success", "STATUS_SUCCESS"), ("failed", "STATUS_FAILURE")])
def test_a_session_ends_as_the_run_did(status: str, expected: str, tmp_path: Path) -> None:
    logger = board(tmp_path)
    logger.describe({"a": 1}, "a: 1")
    logger.finalize(status)
    content = events(tmp_path).summary_metadata["_hparams_/session_end_info"].plugin_data.content
    session = metadata.parse_session_end_info_plugin_data(content)
    assert api_pb2.Status.Name(session.status) == expected


def test_every_chart_of_the_layout_has_a_tag_that_is_written(tmp_path: Path) -> None:
    run = trainer(tmp_path, Throughput(), Consumption(), loggers=[board(tmp_path)], val_check_interval=2)
    run.fit(task(), datamodule=Data())
    classification = ["train/accuracy", "val/accuracy"]  # see tests/tasks/test_classification.py
    tags = [*events(tmp_path).Tags()["scalars"], *classification]
    for charts in LAYOUT.values():
        for _, patterns in charts.values():
            assert all(any(re.fullmatch(pattern, tag) for tag in tags) for pattern in patterns)


def test_consumption_counts_accumulated_batches_and_goes_on(tmp_path: Path) -> None:
    saved = tmp_path / "saved.ckpt"
    first = trainer(tmp_path / "a", Consumption(), accumulate_grad_batches=3, limit_val_batches=0)
    first.fit(task(), datamodule=Data())
    first.save_checkpoint(saved)
    tokens = logged(tmp_path / "a")["train/tokens"]
    assert tokens == {step: 3 * step * BATCH * SEQ_LEN for step in (1, 2, 3, 4)}
    seconds = logged(tmp_path / "a")["train/seconds"]
    assert 0 < seconds[1] < seconds[2] < seconds[4]
    logger = board(tmp_path)
    more = trainer(tmp_path / "b", Consumption(), loggers=[logger], max_steps=6, limit_val_batches=0)
    more.fit(task(max_steps=6), datamodule=Data(), ckpt_path=saved, weights_only=True)
    assert logged(tmp_path / "b")["train/tokens"] == {
        5: tokens[4] + BATCH * SEQ_LEN,
        6: tokens[4] + 2 * BATCH * SEQ_LEN,
    }
    assert logged(tmp_path / "b")["train/seconds"][5] > seconds[4]


def test_curves_against_tokens_are_among_the_points_of_rows() -> None:
    rows = [{"step": "2", "train/loss": "5.0"}, {"step": "2", "train/tokens": "100"}, {"step": "3", "val/loss": "4.5"},
            {"step": "4", "train/loss": "4.0"}, {"step": "4", "train/tokens": "300"}]  # fmt: skip
    found = points(rows)
    assert [point[1:] for point in found if point.tag == "vs_tokens/train/loss"] == [(100, 5), (300, 4)]
    assert [point[1:] for point in found if point.tag == "vs_tokens/val/loss"] == [(200, 4.5)]
    assert [point[1:] for point in found if point.tag == "train/loss"] == [(2, 5), (4, 4)]
    assert points([{"step": "9", "train/loss": "1.0"}]) == [("train/loss", 9, 1.0)], "no tokens were counted"


def test_the_peak_of_memory_is_that_of_training(tmp_path: Path) -> None:
    class Hungry(Callback):
        def on_train_batch_start(self, *_: object) -> None:
            torch.ones(300 * 2**20, dtype=torch.uint8)

    torch.ones(900 * 2**20, dtype=torch.uint8)  # before training: not its own
    before = peak_memory(torch.device("cpu"))
    if before is None:
        pytest.skip("this system does not say how much memory a process had")
    trainer(tmp_path / "a", Consumption(), limit_val_batches=0).fit(task(), datamodule=Data())
    small = logged(tmp_path / "a")["train/peak_memory"][4]
    trainer(tmp_path / "b", Consumption(), Hungry(), limit_val_batches=0).fit(task(), datamodule=Data())
    hungry = logged(tmp_path / "b")["train/peak_memory"][4]
    assert before - small > 400 * 2**20, "the peak before training was counted"
    assert 250 * 2**20 < hungry - small < 400 * 2**20


def test_a_resumed_run_remembers_its_peak(tmp_path: Path) -> None:
    callback = Consumption()
    callback.load_state_dict({"tokens": 5, "seconds": 2.0, "peak": 1e15})
    assert callback.state_dict() == {"tokens": 5, "seconds": 2.0, "peak": 1e15}
    trainer(tmp_path, callback, limit_val_batches=0).fit(task(), datamodule=Data())
    assert set(logged(tmp_path)["train/peak_memory"].values()) == {1e15}
    Consumption().load_state_dict({"tokens": 5, "seconds": 2.0})  # of a run from before it was kept


def test_the_seconds_of_a_run_hold_its_last_validation(tmp_path: Path) -> None:
    class Slow(Callback):
        def on_validation_start(self, *_: object) -> None:
            time.sleep(0.5)

    run = trainer(tmp_path, Consumption(), Slow(), FinalValidation(), val_check_interval=3, num_sanity_val_steps=0)
    run.fit(task(), datamodule=Data())
    seconds = logged(tmp_path)["train/seconds"]
    assert list(seconds) == [1, 2, 3, 4]
    assert seconds[3] < 0.5 and seconds[4] > 1.0


def test_texts_and_hyper_parameters_of_a_recipe_are_escaped(tmp_path: Path) -> None:
    board = Board(tmp_path / "a" / "version_0")
    board.describe({"description": "a\x1b[2J", "data": {"paths": ["b\x9b"]}}, "a: |\n```\n<img src=x>\n```\n")
    board.finalize("success")
    events = EventAccumulator(board.log_dir).Reload()
    (text,) = events.Tensors("recipe/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "````yaml\na: |\n```\n<img src=x>\n```\n````"
    assert flatten({"a": "a\x1b[2J", "b": ["\x9b", 1]}) == {"a": r"a\u001b[2J", "b": r"\u009b, 1"}


def test_nested_values_get_dotted_names() -> None:
    nested = {"a": {"b": {"c": 1.5}, "d": [1, 2]}, "e": None, "f": True, "g": {}}
    assert flatten(nested) == {"a.b.c": 1.5, "a.d": "1, 2", "e": "None", "f": True}
