"""What reaches TensorBoard besides scalars, and the logger that remembers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longnet_kit.callbacks import LastValues, LossByPosition, Throughput, log_hyper_parameters
from longnet_kit.callbacks.hyper_parameters import METRICS, flatten
from tests.tasks.tiny import Data, logged, task, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def board(directory: Path) -> TensorBoardLogger:
    return TensorBoardLogger(directory, name="", version="", default_hp_metric=False)


def events(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_scalars_and_figures_are_at_their_steps(tmp_path: Path) -> None:
    last = LastValues()
    run = trainer(tmp_path, LossByPosition(), Throughput(), loggers=[board(tmp_path), last], val_check_interval=2)
    run.fit(task(), datamodule=Data())
    found = events(tmp_path)
    table = logged(tmp_path)
    scalars = {"train/loss", "train/grad_norm", "train/lr", "train/tokens_per_second", "train/mfu"}
    scalars |= {"val/loss", "val/perplexity", "val/bits_per_byte"}
    assert set(found.Tags()["scalars"]) == scalars == set(table) == set(last.values)
    for tag in scalars:
        read = {event.step: event.value for event in found.Scalars(tag)}
        assert read == pytest.approx(table[tag], rel=1e-6)
        assert last.values[tag] == pytest.approx(table[tag][4])
    images = found.Images("val/loss_by_position")
    assert [image.step for image in images] == [2, 4]
    pixels = np.asarray(Image.open(io.BytesIO(images[0].encoded_image_string)))
    assert pixels.shape[2] == 3 and pixels.std() > 5


def test_no_figure_where_nothing_was_measured(tmp_path: Path) -> None:
    ours = task()
    trainer(None, LossByPosition(), loggers=[board(tmp_path)], limit_val_batches=0).fit(ours, datamodule=Data())
    assert not events(tmp_path).Tags()["images"]


def test_hyper_parameters_start_no_curve(tmp_path: Path) -> None:
    logger = board(tmp_path)
    model = {"dim": 8, "attention": {"segment_lengths": [2, 4]}}
    log_hyper_parameters(logger, {"name": "x", "model": model, "resume": None})
    logger.finalize("success")
    found = events(tmp_path)
    assert not found.Tags()["scalars"]
    assert "_hparams_/session_start_info" in found.summary_metadata
    start = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.attention.segment_lengths" in start and b"2, 4" in start
    experiment = found.summary_metadata["_hparams_/experiment"].plugin_data.content
    assert all(metric.encode() in experiment for metric in METRICS)
    text = found.Tensors("environment/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "torch" in text and "Python" in text


def test_nested_values_get_dotted_names() -> None:
    nested = {"a": {"b": {"c": 1.5}, "d": [1, 2]}, "e": None, "f": True, "g": {}}
    assert flatten(nested) == {"a.b.c": 1.5, "a.d": "1, 2", "e": "None", "f": True}
