"""The TensorBoard logger of a run: scalars, hyper-parameters, the recipe, the environment, and how the run ended."""

from __future__ import annotations

import logging
import math
import platform
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning
import torch
from lightning import Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from longnet_kit import __version__, durable, terminal
from longnet_kit.dotted import leaves
from longnet_kit.errors import UserError
from longnet_kit.report import figures, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYOUT: dict[str, dict[str, list[Any]]] = {
    "quality": {
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "accuracy": ["Multiline", ["train/accuracy", "val/accuracy"]],
        "perplexity": ["Multiline", ["val/perplexity.*"]],
        "bits per byte": ["Multiline", ["val/bits_per_byte"]],
    },
    "quality against tokens": {
        "loss against tokens": ["Multiline", ["vs_tokens/.*loss"]],
        "perplexity against tokens": ["Multiline", ["vs_tokens/val/perplexity"]],
    },
    "speed": {
        "tokens per second": ["Multiline", ["train/tokens_per_second"]],
        "model FLOPs utilisation": ["Multiline", ["train/mfu"]],
        "peak memory (bytes)": ["Multiline", ["train/peak_memory"]],
    },
    "optimization": {
        "gradient norm": ["Multiline", ["train/grad_norm"]],
        "learning rate": ["Multiline", ["train/lr"]],
    },
}
"""The CUSTOM SCALARS tab: chart titles by category, each with the tags that it draws, as regular expressions."""

ROOM = 1 << 20
"""Bytes that must be free where events are written."""
RETRY = 60.0
"""Seconds after which writing is tried again where it has failed although there was room."""

_SESSION = ".session"
"""Ending of the event files that hold a session of the HPARAMS tab."""


class Point(NamedTuple):
    """A point of a curve in TensorBoard."""

    tag: str
    step: int
    value: float


class Board(TensorBoardLogger):
    """Writes TensorBoard's events into a run directory.

    The HPARAMS tab is left to find its columns by itself. An experiment summary would name them, but TensorBoard takes
    the one of the first run that it meets, and hides what only other runs have: the keys of another attention backend.
    Without one, every hyper-parameter of every run is there, and those that differ are told from the rest.

    Args:
        directory: the run directory.
        purge_step: the first step that TensorBoard is to forget, of what was written there before; None for none.
        earlier: the points up to `purge_step`. If the event files lack one, for example after a full disk, TensorBoard
            forgets everything from its step on, and the points are written again. Figures are not: a note says so.
    """

    def __init__(self, directory: Path, purge_step: int | None = None, earlier: Sequence[Point] = ()) -> None:
        if purge_step is not None and earlier:
            purge_step = _first_missing(directory, earlier, purge_step)
        purge = {} if purge_step is None else {"purge_step": purge_step}
        place = {"name": directory.parent.name, "version": directory.name}
        super().__init__(directory.parent.parent, **place, default_hp_metric=False, **purge)  # type: ignore[arg-type]
        self._is_described = False
        self._unwritten: list[tuple[dict[str, float], int | None]] = [
            ({point.tag: point.value}, point.step) for point in earlier if point.step >= (purge_step or 0)
        ]
        self._failed: float | None = None  # when, while it cannot be written

    @rank_zero_only
    def describe(self, hyper_parameters: Mapping[str, Any], recipe: str) -> None:
        """Start the session in the HPARAMS tab, write the texts `recipe` and `environment`, lay out CUSTOM SCALARS.

        Args:
            hyper_parameters: nested; they show up under dotted names, lists as text.
            recipe: as YAML.
        """
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        for earlier in Path(self.log_dir).glob(f"*{_SESSION}"):
            earlier.unlink()
        session: Any = plugin_data_pb2.HParamsPluginData()  # type: ignore[attr-defined]
        session.session_start_info.start_time_secs = time.time()
        for name, value in flatten(hyper_parameters).items():
            kind = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
            setattr(session.session_start_info.hparams[name], kind, value)
        self._write_session(metadata.SESSION_START_INFO_TAG, session)
        writer = self.experiment
        writer.add_text("recipe", table.fenced(recipe.rstrip(), "yaml"), global_step=0)
        writer.add_text("environment", environment(), global_step=0)
        writer.add_custom_scalars(LAYOUT)
        writer.flush()
        self._is_described = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the session in the HPARAMS tab, which shows it as running until then."""
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        if self._is_described:
            session: Any = plugin_data_pb2.HParamsPluginData()  # type: ignore[attr-defined]
            session.session_end_info.status = api_pb2.Status.Value(  # type: ignore[attr-defined]
                "STATUS_SUCCESS" if status == "success" else "STATUS_FAILURE"
            )
            session.session_end_info.end_time_secs = time.time()
            if self.is_writable():
                with suppress(OSError):
                    self._write_session(metadata.SESSION_END_INFO_TAG, session)
            self._is_described = False
        if self._failed is not None:
            self._failed = -math.inf  # however soon, it is the last time
            self.save()
        with suppress(OSError):
            super().finalize(status)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Note scalars; `save` writes them."""
        self._unwritten.append((dict(metrics), step))

    @rank_zero_only
    def save(self) -> None:
        """Write and flush what was logged; a file of hyper-parameters, Lightning's habit, would repeat the recipe.

        What cannot be written is told of once, kept, and tried again the next time.
        """
        if not self.is_writable():
            return
        try:
            writer = self.experiment
            for metrics, step in self._unwritten:
                for tag, value in metrics.items():
                    writer.add_scalar(tag, float(value), step)
            writer.flush()
        except OSError as error:
            self.give_up(error)
            return
        self._unwritten, self._failed = [], None

    def is_writable(self) -> bool:
        """Whether events can be written: there is room, and the last failure is not of just now.

        It is asked first, since TensorBoard writes in a thread, which ends in a traceback and leaves empty files.
        """
        if shutil.disk_usage(self.log_dir).free < ROOM:
            self._fail("no space left on device")
            return False
        return self._failed is None or time.monotonic() - self._failed > RETRY

    def give_up(self, error: OSError) -> None:
        """Leave an event file that cannot be written; another is begun when that may have changed."""
        self._fail(error.strerror or str(error))
        self._failed = time.monotonic()
        with suppress(OSError):
            if self._experiment is not None:
                self._experiment.close()
        self._experiment = None
        self._kwargs.pop("purge_step", None)  # the new file is not to hide what the old one holds

    def _fail(self, reason: str) -> None:
        if self._failed is None:
            rank_zero_warn(
                f"{self.log_dir}: TensorBoard's events cannot be written ({reason}); scalars are kept until they can be"
            )
            self._failed = -math.inf

    def _write_session(self, tag: str, session: Any) -> None:
        """Write into a file of its own, which a resumed run can replace: TensorBoard shows the first that it finds."""
        from tensorboard.compat.proto import summary_pb2
        from tensorboard.plugins.hparams import metadata
        from torch.utils.tensorboard import FileWriter

        summary: Any = summary_pb2.Summary()  # type: ignore[attr-defined]
        summary.value.add(tag=tag, metadata=metadata.create_summary_metadata(session))
        writer = FileWriter(self.log_dir, filename_suffix=_SESSION)
        writer.add_summary(summary)
        writer.close()


def _first_missing(directory: Path, points: Sequence[Point], end: int) -> int:
    """The first step before the end at which the event files of a run lack a point; the end where they lack none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # else it warns of every earlier resume
    for file in directory.glob("*tfevents*"):
        try:
            durable.check_regular(file)
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); move it away, then resume again") from error
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    drawn = {(tag, event.step) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    first = min((x.step for x in points if x.step < end and (x.tag, x.step) not in drawn), default=end)
    images = [event.step for tag in events.Tags()["images"] for event in events.Images(tag)]
    if any(first <= step < end for step in images):
        terminal.say(
            f"note: TensorBoard lacks points of step {first}, so curves are drawn again from there; the figures of "
            "later steps are lost"
        )
    return first


def boards(trainer: Trainer) -> list[Board]:
    """The TensorBoard loggers to draw into: none on ranks other than the first."""
    return [x for x in trainer.loggers if isinstance(x, Board)] if trainer.is_global_zero else []


def draw(trainer: Trainer, tag: str, figure: Figure) -> None:
    """Put a figure into TensorBoard, at the optimizer step where the run is."""
    image = figures.pixels(figure)
    for board in boards(trainer):
        if not board.is_writable():
            continue
        try:
            board.experiment.add_image(tag, image, trainer.global_step, dataformats="HWC")
        except OSError as error:  # the writer of the file has failed before
            board.give_up(error)


def flatten(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Nested mappings as one, under dotted names; whatever is no number, truth value or text becomes text."""

    def plain(value: Any) -> bool | int | float | str:
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = ", ".join(map(str, value))
        return value if isinstance(value, (bool, int, float)) else terminal.printable(str(value))

    return {name: plain(value) for name, value in leaves(values)}


def environment() -> str:
    """What the run ran on, as a Markdown table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    rows = {
        "longnet_kit": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "CUDA": torch.version.cuda or "none",
        "device": device,
        "CPU threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {table.as_markdown(str(value))} |" for name, value in rows.items())]
    )


def _processor() -> str:
    """The CPU's name, which Linux does not tell through `platform`."""
    cpus = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpus.read_text(), re.MULTILINE) if cpus.exists() else None
    return named[1] if named else platform.processor() or platform.machine()
