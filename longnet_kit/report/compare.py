"""`longnet compare`: runs side by side, what differs in their recipes beside what came of it.

Here is the order of things and what is said of them; the columns are in columns.py, the reading in run_paths.py and
history.py, the layout in table.py, the drawing in curves.py. Nothing imports torch, and only a plot matplotlib.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from longnet_kit import typed
from longnet_kit.errors import UserError
from longnet_kit.report import columns, curves, history, run_paths, table
from longnet_kit.report.columns import Row
from longnet_kit.report.table import Column

SORT = "val/loss"
METRICS = (SORT, "val/accuracy", "val/perplexity", "val/bits_per_byte")
DRAWN = ("train/loss", SORT)
_LONGEST_LEGEND = 40


def compare(
    paths: Sequence[str],
    *,
    sort: str | None = None,
    metrics: Sequence[str] = (),
    plot: Path | None = None,
    against: str = "steps",
    csv: Path | None = None,
    markdown: bool = False,
) -> str:
    """Compare runs.

    Args:
        paths: run directories, runs/<name>, folders of runs or glob patterns; everything under runs/ by default.
        sort: the tag to sort by, best run first; by default val/loss.
        metrics: the tags whose final values are shown, and which are drawn.
        plot: a .png, .pdf or .svg file to draw curves into.
        against: the horizontal axis of the plot: steps, tokens, flops, seconds or groups (last values of the tags
            `metric@N` over N).
        csv: a file for the table with its values in full.
        markdown: give the table in Markdown.

    Returns:
        The table, and under it a line on each run that goes on or had something wrong.

    Raises:
        UserError: no run can be read, a path or a tag does not exist, or a file cannot be written.
    """
    curves.check(plot, against)
    if csv is not None:
        table.check_place("--csv", csv)
    rows, remarks = _rows(paths)
    tags = list(dict.fromkeys(tag for row in rows for tag in row.run.tags))
    grouped = curves.grouped(tags) if plot is not None and against == curves.GROUPS else None
    _check_tags("--sort", [] if sort is None else [sort], tags)
    if grouped is None:
        _check_tags("--metric", metrics, tags)
    else:
        _check_groups(metrics, grouped)
    shown = list(dict.fromkeys(metrics)) or [tag for tag in METRICS if tag in tags] or _present(DRAWN[:1], tags)
    by = sort or next(iter(_present([SORT, *shown], tags)), None)
    if by is not None:
        rows.sort(key=lambda row: columns.rank(row.run, by))
    keys = columns.differing(rows)
    made = columns.build(rows, keys, shown, by)
    done, undrawn = [], {}
    if plot is not None:
        panels = list(dict.fromkeys(metrics)) or grouped or _present(DRAWN, tags) or shown
        undrawn = curves.draw([(row.label, row.run) for row in rows], _legend(rows, keys), panels, against, plot)
        done.append(f"wrote the curves of {', '.join(panels)} to {plot}")
    if csv is not None:
        table.write_csv(made, csv)
        done.append(f"wrote {len(rows)} rows to {csv}")
    said = {row.label: [*row.run.notes(), *([undrawn[row.label]] if row.label in undrawn else [])] for row in rows}
    notes = [f"{label}: {'; '.join(words)}" for label, words in said.items() if words] + remarks
    if markdown:
        blocks = [table.markdown(made), "\n".join(f"- {table.as_markdown(line)}" for line in notes + done)]
    else:
        blocks = [table.text(made, _width()), "\n".join(notes), "\n".join(done)]
    return "\n\n".join(block for block in blocks if block)


def _rows(paths: Sequence[str]) -> tuple[list[Row], list[str]]:
    """The runs that can be compared, and sentences on the others."""
    found, remarks = run_paths.expand(paths)
    read = [history.read(path) for path in found]
    usable = [run for run in read if run.is_usable]
    remarks += [f"{run.path}: left out: {'; '.join(run.notes())}" for run in read if not run.is_usable]
    if not usable:
        raise UserError("\n  ".join(["there is no run to compare; train one with `longnet fit`", *remarks]))
    labels = run_paths.labels([run.path for run in usable])
    return [Row(label, run) for label, run in zip(labels, usable, strict=True)], remarks


def _check_tags(option: str, asked: Iterable[str], tags: Sequence[str]) -> None:
    for tag in asked:
        if tag not in tags:
            hint = typed.suggestion(tag, tags)
            known = f" known: {', '.join(sorted(tags))}" if hint.startswith("did you mean") else ""
            raise UserError(f"{option} {tag}: no run has this tag; {hint if tags else 'no run has any yet'}{known}")


def _check_groups(asked: Iterable[str], grouped: Sequence[str]) -> None:
    if not grouped:
        raise UserError("--against groups: no run has a tag METRIC@N, as val/perplexity@512 is; draw against steps")
    for tag in asked:
        if tag not in grouped:
            raise UserError(
                f"--metric {tag}: no run has a tag {tag}@N, of which --against groups draws; use {', '.join(grouped)}"
            )


def _present(wanted: Iterable[str], tags: Sequence[str]) -> list[str]:
    return [tag for tag in wanted if tag in tags]


def _legend(rows: Sequence[Row], keys: Sequence[Column]) -> list[str]:
    """What each curve is called: the keys that differ, where that is short and tells all runs apart, else the run."""
    pairs = [[f"{key.title}={key.texts[i]}" for key in keys] for i in range(len(rows))]
    names = [", ".join(pair) for pair in pairs]
    tell_apart = len(set(names)) == len(names) and max(map(len, names)) <= _LONGEST_LEGEND
    return names if tell_apart and keys else [row.label for row in rows]


def _width() -> int | None:
    """The columns of the terminal; None where the output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
