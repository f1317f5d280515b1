"""What logging costs a run: the time inside everything that writes scalars, figures and texts, over that of training.

    .venv/bin/python tools/bench_logging.py [RECIPE] [key.path=value ...]

trains the recipe (by default the quickstart, 100 steps of it) in a temporary directory and prints a table. Times are
taken inside one run, on one clock, so that a busy machine changes both sides alike.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from lightning import Callback

from longnet_kit import callbacks, recipe
from longnet_kit.tasks import language_modeling

seconds: Counter[str] = Counter()
calls: Counter[str] = Counter()
inside = False


def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its time added to a part, unless another part is being timed around it."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        global inside
        if inside:
            return function(*args, **kwargs)
        inside, began = True, time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            inside = False
            seconds[part] += time.perf_counter() - began
            calls[part] += 1

    return wrapped


def watch() -> None:
    """Time whatever is logged."""
    language_modeling.record = timed("training and validation scalars", language_modeling.record)
    drawn = ["AttentionPattern", "BranchWeights", "LossByPosition", "PerplexityByContext", "Consumption", "Throughput"]
    for name in drawn:
        kind = getattr(callbacks, name)
        for hook in vars(kind):
            if hook.startswith("on_") and hasattr(Callback, hook):
                setattr(kind, hook, timed(name, getattr(kind, hook)))
    callbacks.Board.describe = timed("recipe and environment", callbacks.Board.describe)
    for kind in (callbacks.Board, callbacks.MetricsTable):
        kind.finalize = timed("closing the files", kind.finalize)


def main(arguments: list[str]) -> None:
    """Train and print the table."""
    from longnet_kit import experiment, fitting

    path = arguments[0] if arguments and "=" not in arguments[0] else "quickstart"
    overrides = [item for item in arguments if "=" in item] or ["trainer.max_steps=100"]
    r = recipe.load(path, overrides)
    watch()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        fit = fitting.Trainer.fit
        whole: list[float] = []

        def timed_fit(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return fit(*args, **kwargs)
            finally:
                whole.append(time.perf_counter() - began)

        fitting.Trainer.fit = timed_fit
        experiment.run(r)
    steps = r.trainer["max_steps"]
    print(f"\n| part | calls | seconds | ms per step | share of {whole[0]:.1f} s |\n|---|---|---|---|---|")
    for part, spent in [*seconds.most_common(), ("all", sum(seconds.values()))]:
        print(f"| {part} | {calls[part] or ''} | {spent:.3f} | {1000 * spent / steps:.2f} | {spent / whole[0]:.2%} |")


if __name__ == "__main__":
    main(sys.argv[1:])
