"""The table and the plots of the study, from what tools/study.py has measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

Result = Mapping[str, Any]

ABLATED = "longnet_4k"
"""The row whose ablations begin with its name."""


def write(folder: Path, results: Sequence[Result], lengths: Sequence[int], suffix: int) -> None:
    """Write RESULTS.md, and the plots beside it, of the results that are there by now."""
    rows = _by_row(results)
    if not rows:
        return
    main = {row: found for row, found in rows.items() if row == ABLATED or not row.startswith(ABLATED)}
    others = {row: found for row, found in rows.items() if row.startswith(ABLATED)}
    blocks = [
        "# The study in small",
        _introduction(results, lengths, suffix),
        "## Perplexity at each length",
        _table(main, lengths, "test"),
        "A cell is the perplexity per byte on the test split, with each text cut into windows of that length; of three "
        "seeds the mean, ± their standard deviation. Where the length is beyond the trained one, the model reads it as "
        "it is.",
        *_blockwise(main, lengths),
        "![perplexity by length; bars are one standard deviation of the seeds](perplexity.png)",
        "## Loss against FLOPs",
        "The loss is that of the first batches of the validation split (`trainer.limit_val_batches`) in windows of the "
        "trained length. Runs of different lengths are measured on other parts of it here; in the tables, on the same "
        "text.",
        "![loss against training FLOPs](flops.png)",
        "## Loss against the length of the prompt",
        _prompt_table(main),
        "![loss of the same tokens by the length of the prompt](prompt.png)",
    ]
    if len(others) > 1:
        blocks += ["## Ablations of LongNet at 4K", _table(others, lengths, "test"), *map(_pattern, others)]
    (folder / "RESULTS.md").write_text("\n\n".join(block for block in blocks if block) + "\n")
    _perplexities(main, lengths).savefig(folder / "perplexity.png", dpi=120)
    _against_flops(main).savefig(folder / "flops.png", dpi=120)
    _against_prompt(main).savefig(folder / "prompt.png", dpi=120)


def _by_row(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The seeds of each row; rows by kind and length."""
    found: dict[str, list[Result]] = {}
    kinds = ("transformer", "sparse", "longnet")
    for result in sorted(results, key=lambda x: (kinds.index(x["row"].split("_")[0]), x["trained_length"], x["row"])):
        found.setdefault(result["row"], []).append(result)
    return found


def _introduction(results: Sequence[Result], lengths: Sequence[int], suffix: int) -> str:
    parameters, tokens, batch = (_range(x[key] for x in results) for key in ("parameters", "tokens", "batch_tokens"))
    hours = sum(x["seconds"] for x in results) / 3600
    return (
        f"{len(results)} runs of {parameters} parameters on {tokens} bytes of Python each, in "
        f"batches of {batch}; {hours:.1f} hours of training on one core in all. The recipes are in "
        "this folder, and `python tools/study.py` trains, tests and writes all of this, going on where it was."
    )


def _range(values: Iterable[float]) -> str:
    """What all have, or from what to what it goes."""
    found = sorted(set(values))
    return f"{found[0]:,.0f}" if len(found) == 1 else f"{found[0]:,.0f} to {found[-1]:,.0f}"


def _table(rows: Mapping[str, Sequence[Result]], lengths: Sequence[int], kind: str) -> str:
    lines = [["model", "trained at", "seeds", "training FLOPs", *(f"{n:,}" for n in lengths)]]
    lines.append(["---", "---:", "---:", "---:", *("---:" for _ in lengths)])
    for row, found in rows.items():
        values = [[x[kind][str(n)] for x in found if str(n) in x[kind]] for n in lengths]
        if any(values):
            flops = f"{found[0]['flops']:.2e}" if found[0]["flops"] else "-"
            lines.append([row, f"{found[0]['trained_length']:,}", str(len(found)), flops, *map(_spread, values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _blockwise(rows: Mapping[str, Sequence[Result]], lengths: Sequence[int]) -> list[str]:
    """What models do at lengths beyond their own without seeing that far; nothing where no model is tested there."""
    if not any(x["blockwise"] for found in rows.values() for x in found):
        return []
    told = "The same with no token seeing further than the trained length (windows of it that move by half of it):"
    return [told, _table(rows, [n for n in lengths if n > min(lengths)], "blockwise")]


def _spread(losses: Sequence[float]) -> str:
    """Perplexities: mean, and the standard deviation where there are several."""
    found = [math.exp(loss) for loss in losses]
    if not found:
        return "-"
    mean = statistics.mean(found)
    return f"{mean:.3f} ± {statistics.stdev(found):.3f}" if len(found) > 1 else f"{mean:.3f}"


def _prompt_table(rows: Mapping[str, Sequence[Result]]) -> str:
    prompts = sorted({int(p) for found in rows.values() for x in found for p in x["prompt"]})
    lines = [["model", *(f"{p:,}" for p in prompts)], ["---", *("---:" for _ in prompts)]]
    for row, found in rows.items():
        means = [[x["prompt"][str(p)] for x in found if str(p) in x["prompt"]] for p in prompts]
        lines.append([row, *(f"{statistics.mean(values):.4f}" if values else "-" for values in means)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pattern(row: str) -> str:
    """The picture of a row's pattern in small, as tools/study.py has drawn it."""
    return f"{row}, on 16 tokens:\n\n![who sees whom in {row}](patterns/{row}.png)"


_STYLES = {"transformer": ("black", "o"), "sparse": ("tab:orange", "s"), "longnet": ("tab:blue", "^")}


def _perplexities(rows: Mapping[str, Sequence[Result]], lengths: Sequence[int]) -> Figure:
    figure, axes = _axes("length of the tested text (bytes)", "perplexity per byte")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    for scale in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        scale(ScalarFormatter())
    for (row, found), style in zip(rows.items(), _styles(rows), strict=True):
        of_seeds = [[math.exp(x["test"][str(n)]) for x in found] for n in lengths]
        spreads = [statistics.stdev(values) for values in of_seeds] if len(found) > 1 else None
        axes.errorbar(lengths, list(map(statistics.mean, of_seeds)), spreads, label=row, capsize=3, **style)
    _explain(figure, axes)
    return figure


def _against_flops(rows: Mapping[str, Sequence[Result]]) -> Figure:
    figure, axes = _axes("training FLOPs", "validation loss (nats per byte), at the trained length")
    for (row, found), style in zip(rows.items(), _styles(rows), strict=True):
        if not found[0]["flops"]:
            continue  # its backend cannot count them
        curves = np.array([x["curve"] for x in found])  # (seeds, points, 2)
        axes.plot(*curves.mean(0).T, label=row, **style)
    _explain(figure, axes)
    return figure


def _against_prompt(rows: Mapping[str, Sequence[Result]]) -> Figure:
    figure, axes = _axes("bytes of prompt before the same 512", "loss (nats per byte)")
    axes.set_xscale("symlog", base=2, linthresh=512)
    for (row, found), style in zip(rows.items(), _styles(rows), strict=True):
        prompts = sorted(map(int, found[0]["prompt"]))
        axes.plot(prompts, [statistics.mean(x["prompt"][str(p)] for x in found) for p in prompts], label=row, **style)
    ticks = sorted({int(p) for found in rows.values() for p in found[0]["prompt"]})
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    _explain(figure, axes)
    return figure


def _explain(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small", frameon=False)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _styles(rows: Mapping[str, Sequence[Result]]) -> list[dict[str, Any]]:
    """A colour and a marker for each kind of model; the longer the trained length, the more solid."""
    longest = max(found[0]["trained_length"] for found in rows.values())
    made = []
    for row, found in rows.items():
        colour, marker = _STYLES[row.split("_")[0]]
        share = math.log2(found[0]["trained_length"]) / math.log2(longest)
        made.append({"color": colour, "marker": marker, "markersize": 4, "alpha": max(0.35, share**6)})
    return made
