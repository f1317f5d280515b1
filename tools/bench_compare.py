"""How long `longnet compare` takes on many long runs.

    .venv/bin/python tools/bench_compare.py [--runs 50] [--rows 10000] [--columns 14]

The runs are synthetic: every row has every column, which is more than a run logs. Each row is a fresh
interpreter that compares them and ends: wall time and CPU time, best of three. The first is what starting takes.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CALL = "import sys; from pathlib import Path; from longnet_kit.report.compare import compare; "
CASES = {
    "start": "",
    "table": "compare([])",
    "table, sorted by another tag": "compare([], sort='train/loss', metrics=['val/loss', 'train/grad_norm'])",
    "table and plot": "compare([], plot=Path('curves.png'))",
    "table and plot against tokens": "compare([], plot=Path('curves.png'), against='tokens')",
}


def write(folder: Path, rows: int, columns: int, seed: int) -> None:
    """One run of falling losses."""
    draws = np.random.default_rng(seed)
    steps = np.arange(1, rows + 1)
    tags = ["train/loss", "val/loss", "train/tokens", "train/seconds", "train/tokens_per_second", "train/grad_norm"]
    tags = [*tags, *(f"train/other_{i}" for i in range(columns - 1 - len(tags)))][: columns - 1]
    values = {tag: draws.random(rows) for tag in tags}
    for tag in ("train/loss", "val/loss"):
        values[tag] = 2 + 3 * (1 + seed / 50) * (steps + 100.0) ** -0.2 + 0.05 * draws.standard_normal(rows)
    values |= {"train/tokens": 8192.0 * steps, "train/seconds": (1 + seed % 3) * 0.1 * steps}
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w") as file:
        file.write(",".join(["step", *tags]) + "\n")
        for row in zip(steps.tolist(), *(values[tag].tolist() for tag in tags), strict=True):
            file.write(",".join(map(repr, row)) + "\n")
    layers = "\n".join(f"  key_{i}: {i}" for i in range(50))
    lr = f"optimizer:\n  lr: {1e-4 * (seed + 1):.15g}\n"
    (folder / "recipe.yaml").write_text(f"name: lr={seed}\n{lr}model:\n{layers}\n")
    (folder / "summary.json").write_text('{"status": "finished"}')


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--runs", 50), ("--rows", 10_000), ("--columns", 14)):
        parser.add_argument(name, type=int, default=default)
    a = parser.parse_args()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with tempfile.TemporaryDirectory() as place:
        for i in range(a.runs):
            write(Path(place) / "runs" / f"lr={i}" / "version_0", a.rows, a.columns, i)
        size = sum(file.stat().st_size for file in Path(place).rglob("metrics.csv"))
        print(f"{a.runs} runs of {a.rows} rows and {a.columns} columns, {size / 1e6:.0f} MB; {os.cpu_count()} cores of "
              f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}")  # fmt: skip
        for name, code in CASES.items():
            wall, cpu = [], []
            for _ in range(3):
                started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run([sys.executable, "-c", CALL + code], cwd=place, env=environment, check=True)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                wall.append(time.perf_counter() - started)
                cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            print(f"{name:<32} {min(wall):5.2f} s   {min(cpu):5.2f} s CPU")


if __name__ == "__main__":
    main()
