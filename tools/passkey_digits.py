"""Whose digits a network names where it is asked for a pass key: the right key's, or another's that stands in the text.

    python tools/passkey_digits.py runs/passkey_longnet
    python tools/passkey_digits.py runs/passkey_longnet data.spread=0 --examples 256

Of each answer of the test split, the first digit alone is looked at: later ones follow from it, since few keys in a
text begin alike. A network that sees the keys but does not tell them apart names each equally often.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch

from longnet_kit import experiment, recipe, runs, weights

STATED = re.compile(rb"Pass key ([A-Z]) is (\d)")
ASKED = re.compile(rb"Pass key ([A-Z])\? (\d)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("overrides", nargs="*", help="dotlist items over the run's recipe")
    parser.add_argument("--examples", type=int, default=1024, help="of the test split (1024)")
    options = parser.parse_intermixed_args()
    directory = runs.find(options.run)
    r = recipe.load_saved(directory, [*options.overrides, f"data.test_examples={options.examples}"])
    if r.data.source != "passkey":
        raise ValueError(f"{options.run} was trained on data.source {r.data.source}, expected passkey")
    data = experiment.build_data(r)
    data.prepare_data()
    data.setup("test")
    task = experiment.build_task(r)
    weights.load(task.model, runs.checkpoint(directory))  # type: ignore[arg-type]
    task.eval()
    found: dict[int, list[tuple[bool, bool, int]]] = defaultdict(list)
    with torch.inference_mode():
        for batch in data.test_dataloader():
            named = task(batch["tokens"]).argmax(-1)
            for tokens, row in zip(batch["tokens"], named, strict=True):
                for distance, right, another, others in named_digits(bytes(tokens.tolist()), row.tolist()):
                    group = next(d for d in sorted(r.data.options["distances"]) if d >= distance)
                    found[group].append((right, another, others))
    print("distance  answers  right key's  another's  others before  each of these")
    for group, answers in sorted(found.items()):
        right, another, others = (sum(column) / len(answers) for column in zip(*answers, strict=True))
        each = another / others if others else 0
        print(f"{group:>8}  {len(answers):>7,}  {right:>11.3f}  {another:>9.3f}  {others:>13.2f}  {each:>13.3f}")
    return 0


def named_digits(text: bytes, named: list[int]) -> list[tuple[int, bool, bool, int]]:
    """Each answer's distance, whether its first digit is named, or another key's, and how many such others there are.

    Args:
        text: the tokens of a sequence.
        named: the likeliest next token after each of them.
    """
    stated = {match[1]: (match.start(2), match[2][0]) for match in STATED.finditer(text)}
    answers = []
    for match in ASKED.finditer(text):
        place = match.start(2)
        at, digit = stated[match[1]]
        others = {other for start, other in stated.values() if start < place} - {digit}
        answers.append((place - at, named[place - 1] == digit, named[place - 1] in others, len(others)))
    return answers


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(str(error))
