"""Kill trainings with SIGKILL at random moments, some in the middle of a save, resume each, kill it again, and compare
it in the end with one that nothing disturbed: losses and samples of every step, weights, optimizer, schedule,
generators, Lightning's loops, bit for bit; every row of metrics.csv, the best checkpoint, TensorBoard's curves.

    .venv/bin/python tools/soak_kills.py --kills 20 --chain 3 --saves 5 --workers 2 --accumulate 3

It needs a system with fork: the processes to kill are made from one that has imported everything.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longnet_kit import callbacks, checkpoint_io, experiment, recipe, runs
from longnet_kit.tasks import LanguageModeling

RECIPE = """
name: soak
model: {dim: 32, layers: 2, heads: 2, ffn_dim: 64, dropout: 0.1,
        attention: {backend: dilated, segment_lengths: [16, 64], dilation_rates: [1, 2]}}
data: {source: files, paths: [text.txt], tokenizer: bytes, seq_len: 64, batch_size: 2, eval_contexts: [16, 64]}
optimizer: {lr: 3.0e-3, warmup_steps: 5}
trainer: {limit_val_batches: 4, accelerator: cpu,
          log_every_n_steps: 1, num_sanity_val_steps: 0, enable_progress_bar: false}
checkpoint: {every_n_steps: 4, keep: 2}
"""
TIMED = {"train/seconds", "train/tokens_per_second", "train/mfu", "train/peak_memory"}
STEPS, VALIDATED = 40, 7
"""The optimizer steps of a training, and those from one validation to the next."""
STATES = (
    "state_dict", "optimizer_states", "lr_schedulers", "generators", "LanguageModelingData", "global_step", "loops"
)  # fmt: skip
TRACE = "trace.txt"
LAST = [
    (callbacks.Saving, "on_train_batch_end", True),
    (callbacks.Consumption, "on_validation_end", False),
    (callbacks.LossByPosition, "on_validation_end", True),
    (callbacks.Saving, "on_validation_end", False),
    (callbacks.Consumption, "on_train_end", False),
    (callbacks.Consumption, "on_train_end", True),
]
"""Moments after the last update: from its checkpoint to the end of the run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="how often trainings are killed")
    parser.add_argument("--chain", type=int, default=1, help="how often each training is killed")
    parser.add_argument("--saves", type=int, default=5, help="how many of the kills come in the middle of a save")
    parser.add_argument("--workers", type=int, default=0, help="data loader processes of each training")
    parser.add_argument("--accumulate", type=int, default=2, help="batches of an optimizer step")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--last-step", action="store_true", help="kill others at chosen moments after the last update")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        return Soak(arguments.workers, arguments.accumulate, random.Random(arguments.seed)).run(
            arguments.kills, arguments.chain, arguments.saves, arguments.last_step
        )


class Soak:
    """Trainings that are killed, and one that nothing disturbs, in the working directory.

    Args:
        workers: data loader processes of each training.
        accumulate: batches of an optimizer step.
        moments: draws when a training is killed.
    """

    def __init__(self, workers: int, accumulate: int, moments: random.Random) -> None:
        lay()
        self._overrides = [
            f"data.num_workers={workers}",
            f"trainer.max_steps={STEPS}",
            f"trainer.accumulate_grad_batches={accumulate}",
            f"trainer.val_check_interval={VALIDATED * accumulate}",
        ]
        self._moments = moments
        began = time.monotonic()
        assert ended(self._train("whole")) == 0, Path("whole.log").read_text()
        self._whole = outcome("whole")
        self._batches = len(self._whole["trace"])
        self._seconds_a_batch = (time.monotonic() - began) / self._batches
        print(f"{workers} workers, {accumulate} batches a step, undisturbed: {time.monotonic() - began:.1f} s")

    def run(self, kills: int, chain: int, saves: int, last_step: bool) -> int:
        """Kill, resume and compare; returns how many trainings differed."""
        wrong = killed = trainings = 0
        while killed < kills:
            name, hows = f"killed_{trainings}", []
            for number in range(min(chain, kills - killed)):
                in_save = trainings < saves and number == trainings % chain
                how, was_killed = self._kill_in_a_save(name) if in_save else self._kill_at_a_batch(name)
                hows.append(f"{how} (checkpoint {saved_step(name)})")
                killed += was_killed
                if not was_killed:
                    break
            wrong += self._differs(", ".join(hows), name)
            trainings += 1
        for number, (callback, hook, is_after) in enumerate(LAST if last_step else []):
            name = f"last_{number}"
            ended(self._train(name, lambda c=callback, h=hook, a=is_after: die_in_the_last_step(c, h, a)))
            wrong += self._differs(f"{'after' if is_after else 'before'} {callback.__name__}.{hook}", name)
            killed += 1
            trainings += 1
        print(f"{trainings - wrong} of {trainings} are bit-identical to the undisturbed one, after {killed} kills")
        return wrong

    def _train(self, name: str, prepare: Callable[[], None] = lambda: None) -> int:
        return train(name, self._overrides, prepare)

    def _kill_in_a_save(self, name: str) -> tuple[str, bool]:
        """Kill a training in the middle of a save; returns how, and False if it had ended before."""
        save, share = self._moments.randrange(1, 4), self._moments.random()
        code = ended(self._train(name, lambda: die_in_save(save, share)))
        return f"in save {save} at {share:.0%}", code == -signal.SIGKILL

    def _kill_at_a_batch(self, name: str) -> tuple[str, bool]:
        """Kill a training in the first half of what is left of it; returns how, and False if it had ended before."""
        file = Path(f"{name}.{TRACE}")
        traced = file.read_bytes().count(b"\n") if file.exists() else 0
        left = self._batches - saved_step(name) * self._batches // STEPS
        batch, delay = self._moments.randrange(left // 2 + 1), self._moments.uniform(0, 2 * self._seconds_a_batch)
        pid = self._train(name)
        wait_for(traced + batch, file, pid)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        return f"{1000 * delay:.0f} ms after batch {batch}", ended(pid) == -signal.SIGKILL

    def _differs(self, how: str, name: str) -> bool:
        """Let a killed training go on to its end, and print and return whether it differs from the undisturbed one."""
        is_sound = ended(self._train(name)) == 0
        different = differences(self._whole, outcome(name)) if is_sound else [Path(f"{name}.log").read_text()[-2000:]]
        print(f"{how}: {'; '.join(different) or 'identical'}", flush=True)
        return bool(different)


def lay() -> None:
    """A recipe and a text in the working directory."""
    words = random.Random(0)
    lines = (f"def f{words.randrange(99)}(x):\n    return x + {words.randrange(9)}\n" for _ in range(1500))
    Path("text.txt").write_text("".join(lines))
    Path("soak.yaml").write_text(RECIPE)
    os.environ["LONGNET_CACHE"] = os.path.abspath("cache")


def train(name: str, overrides: list[str], prepare: Callable[[], None]) -> int:
    """Start a training in a process of its own; returns the process's number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        trace(Path(f"{name}.{TRACE}"))
        prepare()
        experiment.run(recipe.load("soak.yaml", [f"name={name}", "resume=auto", *overrides]))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def trace(file: Path) -> None:
    """Note each batch that is trained on: its step, its samples, its loss."""
    step = LanguageModeling.training_step

    def noted(self: LanguageModeling, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        with file.open("a") as out:
            out.write(f"{self.trainer.global_step} {batch_idx}: {batch['index'].tolist()} {loss.item().hex()}\n")
        return loss

    LanguageModeling.training_step = noted  # type: ignore[method-assign]


def die_in_the_last_step(callback: type, hook: str, is_after: bool) -> None:
    """Let a hook of a callback in the last step be where this process ends."""
    act = getattr(callback, hook)

    def fatal(self: Any, trainer: Any, *rest: Any) -> None:
        is_last = trainer.global_step == trainer.max_steps
        if is_last and not is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        act(self, trainer, *rest)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(callback, hook, fatal)


def die_in_save(number: int, share: float) -> None:
    """Let a save be the last thing that this process does: it ends when a share of the file is written."""
    saves, write = [0], checkpoint_io._Hashing.write
    size = [0]

    def fatal(self: checkpoint_io._Hashing, content: bytes) -> int:
        if not hasattr(self, "seen"):
            self.seen = 0  # type: ignore[attr-defined]
            saves[0] += 1
        if saves[0] == number and self.seen + len(content) > share * size[0]:  # type: ignore[attr-defined]
            write(self, content[: len(content) // 2])
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += len(content)  # type: ignore[attr-defined]
        size[0] = max(size[0], self.seen)  # type: ignore[attr-defined]
        return write(self, content)

    checkpoint_io._Hashing.write = fatal  # type: ignore[method-assign]


def wait_for(batch: int, file: Path, pid: int) -> None:
    """Wait until a training has come to a batch, or has ended."""
    while batch and not (file.exists() and file.read_bytes().count(b"\n") >= batch):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.001)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def saved_step(name: str) -> int:
    found = runs.checkpoints(Path("runs", name, "version_0"))
    return runs.step_of(found[-1]) if found else 0


def outcome(name: str) -> dict[str, Any]:
    """All that must not depend on what happened to a training."""
    run = Path("runs", name, "version_0")
    with (run / runs.METRICS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    curves: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        for tag, value in row.items():
            if value and tag != "step" and tag not in TIMED:
                curves.setdefault(tag, []).append((row["step"], value))
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    drawn = {tag: board.Scalars(tag) for tag in board.Tags()["scalars"] if tag not in TIMED}
    saved = torch.load(runs.checkpoint(run), weights_only=True)
    lines = Path(f"{name}.{TRACE}").read_text().splitlines()
    return {
        "curves": curves,
        "board": {tag: [(event.step, event.value) for event in events] for tag, events in drawn.items()},
        "trace": set(lines),  # what was trained on twice must have been the same twice
        "best": (run / runs.CHECKPOINTS / runs.BEST).resolve(strict=True).name,
        "validated": {step: loss.hex() for step, loss in saved["callbacks"]["Saving"]["validated"].items()},
        "checkpoints": [path.name for path in runs.checkpoints(run)],
        "version": len(runs.versions(name)),
    } | {key: saved[key] for key in STATES}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [key for key in one if not same(one[key], other[key])]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


if __name__ == "__main__":
    sys.exit(min(1, main()))
