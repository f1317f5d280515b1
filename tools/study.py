"""The paper's study in small: train recipes/study, test every run at each length, write the table and the plots.

    python tools/study.py                      everything: about four and a half hours, on one core
    python tools/study.py --rows longnet_8k    some rows; several such commands may run at once
    python tools/study.py --report             only test and write what is trained by now

Each row of the table is a recipe of recipes/study, and is trained by `longnet sweep`, so any of these goes on where it
was. A run that has finished is tested on the same text as all others, and what came of it is written to
recipes/study/results at once; what stands there is not trained again, even where its run directory is gone. What was
measured of a recipe that has changed since does not count: its row is left out until it is trained and tested again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import study_report
import torch
from torch import Tensor

from longnet_kit import durable, experiment, recipe, runs, sweep
from longnet_kit.inference import network
from longnet_kit.model import Transformer
from longnet_kit.model.loss import token_losses
from longnet_kit.report import curves, history, pattern

FOLDER = Path("recipes/study")
LENGTHS = (512, 2048, 8192)
"""Of the contexts that perplexity is tested at, in tokens."""
WINDOWS = 32
"""Of the longest of these, from the test split; the others are cut out of them, so all test the same tokens."""
SUFFIX = 512
"""Tokens whose loss is measured after prompts of growing length."""
SEEDS = {"transformer_512": (1, 2, 3), "sparse_8k": (1, 2, 3), "longnet_8k": (1, 2, 3)}
"""Of the headline rows; every other one is trained once, with the first."""
WORDS = ("name", "description", "extends", "resume")
"""The keys of a recipe that what comes of it does not depend on."""

ADDED = (("optimizer", "eps", 1e-8),)
"""Keys that recipes have got since results were measured, with the value that was fixed then."""


def main() -> int:
    options = _options()
    rows = {path.stem: path for path in sorted(FOLDER.rglob("*.yaml"))}
    if not rows:
        sys.exit(f"{FOLDER} has no recipes; run this from the folder that the kit is checked out in")
    wanted = options.rows or list(rows)
    if unknown := [row for row in wanted if row not in rows]:
        sys.exit(f"--rows {','.join(unknown)}: no such recipe in {FOLDER}; there are {', '.join(rows)}")
    try:
        code = _train_and_measure({row: rows[row] for row in wanted}, report=options.report)
    except ValueError as error:
        sys.exit(str(error))
    _draw_patterns({row: path for row, path in rows.items() if row.startswith(study_report.ABLATED)})
    found = _results()
    for row, seed in (old := [key for key, result in found.items() if not _is_current(result, rows)]):
        print(f"left out: {row}, seed {seed}, was measured of another recipe than {FOLDER} has now")
    study_report.write(FOLDER, [result for key, result in found.items() if key not in old], LENGTHS, SUFFIX)
    return code


def _train_and_measure(rows: Mapping[str, Path], *, report: bool) -> int:
    """Train, unless there is only to be a report, and measure what has finished; returns the exit code."""
    code = 0
    for seed in (1, 2, 3):
        for row, path in rows.items():
            if seed not in SEEDS.get(row, (1,)) or _is_current(_results().get((row, seed)), rows):
                continue
            items = [f"name={_name(row, seed)}", f"seed={seed}"]
            if not report:
                code |= sweep.sweep(str(path), items)
            directory = runs.ROOT / f"{_name(row, seed)}_sweep_cell"
            experiment_of = _experiment(recipe.load(path, items))
            if (found := _finished(directory, experiment_of)) is not None:
                _add({"row": row, "seed": seed, "experiment": experiment_of, **_measured(found)})
    return code


def _experiment(r: recipe.Recipe) -> str:
    """A hash of all that a result depends on: the recipe, but for its names, and how it is tested."""
    keys = {key: value for key, value in recipe.to_dict(r).items() if key not in WORDS}
    for section, key, default in ADDED:
        if keys[section][key] == default:
            del keys[section][key]
    told = json.dumps([keys, LENGTHS, WINDOWS, SUFFIX], sort_keys=True, default=str)
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def _is_current(result: Mapping[str, Any] | None, rows: Mapping[str, Path]) -> bool:
    """Whether a result was measured, and of the recipe that its row has now."""
    if result is None or result["row"] not in rows:
        return False
    now = recipe.load(rows[result["row"]], [f"seed={result['seed']}"])
    return result.get("experiment") == _experiment(now)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: text.split(","), help="recipes of the study; by default all")
    parser.add_argument("--report", action="store_true", help="train nothing")
    return parser.parse_args()


def _name(row: str, seed: int) -> str:
    return f"study_{row}_{seed}"


def _finished(directory: Path, experiment_of: str) -> Path | None:
    """The newest version of a run of an experiment, if it has finished."""
    found = [
        version
        for version in runs.versions(directory.name)
        if runs.read_summary(version).get("status") == "finished"
        and _experiment(recipe.load_saved(version)) == experiment_of
    ]
    return found[-1] if found else None


def _draw_patterns(rows: Mapping[str, Path]) -> None:
    """Draw the patterns of the ablations as three branches show them on 16 tokens."""
    (FOLDER / "patterns").mkdir(exist_ok=True)
    small = ["model.attention.segment_lengths=[4,8,16]", "model.attention.dilation_rates=[1,2,4]"]
    for row, path in rows.items():
        pattern.draw(recipe.load(path, small), 16, FOLDER / "patterns" / f"{row}.png")


def _results() -> dict[tuple[str, int], dict[str, Any]]:
    """What was measured by now, by row and seed."""
    found = [json.loads(file.read_text()) for file in sorted((FOLDER / "results").glob("*.json"))]
    return {(one["row"], one["seed"]): one for one in found}


def _add(result: dict[str, Any]) -> None:
    """Write a result into a file of its own: several commands may train at once."""
    (FOLDER / "results").mkdir(exist_ok=True)
    with durable.replacing(FOLDER / "results" / f"{result['row']}-{result['seed']}.json") as staged:
        staged.write_text(json.dumps(result, indent=1) + "\n")


def _measured(directory: Path) -> dict[str, Any]:
    """What a finished run took, and how well it does at each length."""
    r = recipe.load_saved(directory)
    run = history.read(directory)
    taken = {key: run.final(f"train/{key}") for key in ("tokens", "flops", "seconds")}
    flops, loss = (run.metrics.series(tag) for tag in ("train/flops", "val/loss"))
    curve = curves.place(loss, flops)
    trained = network.load(directory)
    texts = list(_windows(r))
    net, length = trained.network, r.data.seq_len
    with trained.computing():
        return {
            "trained_length": length,
            "batch_tokens": length * r.data.batch_size * r.trainer.get("accumulate_grad_batches", 1),
            "parameters": sum(p.numel() for p in net.parameters()),
            **taken,
            "curve": [[float(x), float(y)] for x, y in zip(*curve, strict=True)],
            "test": {str(n): _loss(net, texts, n) for n in LENGTHS},
            "blockwise": {str(n): _blockwise_loss(net, texts, n, length) for n in LENGTHS if n > length},
            "prompt": {str(n - SUFFIX): _suffix_loss(net, texts, n) for n in _doublings() if n <= length},
        }


def _windows(r: recipe.Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets, (1, longest length) each, of the test split: the same for every run."""
    section = dataclasses.replace(r.data, seq_len=max(LENGTHS), batch_size=1, eval_contexts=[])
    data = experiment.build_data(dataclasses.replace(r, data=section))
    data.prepare_data()
    data.setup("test")
    for _, batch in zip(range(WINDOWS), data.test_dataloader(), strict=False):
        yield batch["tokens"], batch["targets"]


def _doublings() -> list[int]:
    return [SUFFIX << i for i in range((max(LENGTHS) // SUFFIX).bit_length())]


def _loss(net: Transformer, texts: Sequence[tuple[Tensor, Tensor]], length: int) -> float:
    """Mean loss in nats over windows of a length, as the network is."""
    losses = [_losses(net, *(x.view(-1, length) for x in text)) for text in texts]
    return float(torch.cat([x.flatten() for x in losses]).mean(dtype=torch.float64))


def _blockwise_loss(net: Transformer, texts: Sequence[tuple[Tensor, Tensor]], length: int, trained: int) -> float:
    """The same in windows of the trained length that move by half of it, so that no token sees further than that."""
    half, found = trained // 2, []
    for text in texts:
        tokens, targets = (x.view(-1, length) for x in text)
        windows = [x.unfold(1, trained, half).flatten(0, 1) for x in (tokens, targets)]
        losses = _losses(net, *windows).view(len(tokens), -1, trained)
        found += [losses[:, 0, :half].flatten(), losses[:, :, half:].flatten()]
    return float(torch.cat(found).mean(dtype=torch.float64))


def _suffix_loss(net: Transformer, texts: Sequence[tuple[Tensor, Tensor]], length: int) -> float:
    """Mean loss of the last tokens of each text, given as many before them as make up `length` in all."""
    losses = [_losses(net, *(x[:, -length:] for x in text))[:, -SUFFIX:] for text in texts]
    return float(torch.cat(losses).mean(dtype=torch.float64))


def _losses(net: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Losses of each token, (B, N), a few rows at a time."""
    parts = zip(*(x.split(max(1, max(LENGTHS) // x.shape[1])) for x in (tokens, targets)), strict=True)
    return torch.cat([token_losses(net.hidden(x), net.embedding.weight, y) for x, y in parts])


if __name__ == "__main__":
    sys.exit(main())
