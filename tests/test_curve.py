"""A small run follows its stored curve: a change of anything that training computes shows here.

tests/curve holds the recipe, its text, drawn from a small grammar, and loss.csv: loss and gradient norm of each of 100
steps, and the loss of the validation after them. They are compared in the precision that runs have by default, and in
float64, where rounding hides nothing; there the weights are drawn in float64 too, since torch draws float32 by code
that depends on the CPU.

Largest relative deviations of loss and gradient norm, torch 2.13.0 on an x86-64 CPU with AVX-512:

                                                      32-true            64-true
    two threads in place of one                   7.1e-8  5.3e-7     4e-16  1e-15
    ATEN_CPU_CAPABILITY=avx2                      6.8e-8  9.4e-7     4e-16  3e-15
    ATEN_CPU_CAPABILITY=default                   7.0e-8  8.5e-7     4e-16  2e-15
    without mkldnn                                4.8e-8  5.8e-7         0      0
    default, MKL_CBWR=COMPATIBLE, two threads,
        without mkldnn                            7.4e-8  1.2e-6     4e-16  2e-15

and of the loss by changes that must show:

    lr 0.01% higher                                       2.9e-5            3.0e-5
    betas [0.9, 0.9801]                                   3.1e-5            1.2e-5
    weight decay 1% higher                                7.9e-6            7.9e-6
    dropout's factors in another order                    2.4e-2            2.7e-2
    head_offsets: grouped                                 1.8e-2            3.2e-2
    eps of the last layer norm 1e-6, not 1e-5             1.7e-7, hidden    1.0e-7

What a change is meant to do to the curve is looked at first; then `python -m tests.test_curve`, in the root of the
clone, stores it anew.
"""

from __future__ import annotations

import contextlib
import csv
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longnet_kit import experiment, recipe

CURVE = Path(__file__).parent / "curve"
STORED = CURVE / "loss.csv"
TAGS = ("train/loss", "train/grad_norm", "val/loss")
TOLERANCE = {"32-true": {"train/loss": 1e-6, "train/grad_norm": 1e-5, "val/loss": 1e-6},
             "64-true": dict.fromkeys(TAGS, 1e-12)}  # fmt: skip
"""Relative. In float32 ten times the largest deviation above; in float64 other platforms' rounding has room too."""

Point = tuple[int, str]


def train(precision: str, folder: Path) -> dict[Point, float]:
    """Train in a folder; every value by step and tag."""
    (folder / "tests").mkdir()
    (folder / "tests" / "curve").symlink_to(CURVE)
    with contextlib.chdir(folder), default_dtype(torch.float64 if precision == "64-true" else torch.float32):
        run = experiment.run(recipe.load("tests/curve/recipe.yaml", [f"trainer.precision={precision}"]))
        with (run / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    return {(int(row["step"]), tag): float(row[tag]) for row in rows for tag in TAGS if row.get(tag)}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def stored(precision: str) -> dict[Point, float]:
    with STORED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["precision"] == precision]
    return {(int(row["step"]), tag): float(row[tag]) for row in rows for tag in TAGS if row[tag]}


@pytest.mark.parametrize("precision", TOLERANCE)
def test_a_run_follows_its_stored_curve(precision: str, tmp_path: Path) -> None:
    found, expected = train(precision, tmp_path), stored(precision)
    assert found.keys() == expected.keys()
    off = {point: abs(found[point] / value - 1) for point, value in expected.items()}
    beyond = [point for point in sorted(off) if not off[point] <= TOLERANCE[precision][point[1]]]
    told = [f"step {step}: {tag} is {found[step, tag]!r}, {off[step, tag]:.1e} off" for step, tag in beyond]
    assert not beyond, "\n".join([*told[:5], f"{len(told)} of {len(off)} in all; see the head of this file"])


@pytest.mark.parametrize("precision", TOLERANCE)
def test_the_stored_curve_is_that_of_a_run_that_learns(precision: str) -> None:
    values = stored(precision)
    assert {step for step, tag in values if tag == "train/loss"} == set(range(1, 101))
    assert values[1, "train/loss"] > 5.5 and values[100, "train/loss"] < 2.1 and values[100, "val/loss"] < 2.0


def store() -> None:
    """Train in each precision and write what came of it."""
    lines = [",".join(("precision", "step", *TAGS))]
    for precision in TOLERANCE:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = train(precision, Path(folder))
        for step in sorted({step for step, _ in found}):
            lines.append(",".join((precision, str(step), *(str(found.get((step, tag), "")) for tag in TAGS))))
    STORED.write_text("\n".join(lines) + "\n", newline="\n")


if __name__ == "__main__":
    store()
