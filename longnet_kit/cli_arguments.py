"""What the command `longnet` takes: its verbs, and the arguments of each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

import longnet_kit
from longnet_kit import typed
from longnet_kit.errors import UserError
from longnet_kit.inference import CHUNK

VERBS = (
    "fit", "validate", "test", "export", "list", "show", "plan", "pattern", "sweep", "compare", "board",
    "generate", "stream", "check-backend",
)  # fmt: skip


class UsageError(UserError):
    """Arguments that the command does not take."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse; options of a verb may stand anywhere after it.

    The verb is looked at first: argparse would not say which one was meant.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
        raise UsageError(f"there is no verb {argv[0]!r}; {typed.suggestion(argv[0], VERBS)}")
    parser, verbs = _parsers()
    if argv and argv[0] in verbs:
        return verbs[argv[0]].parse_intermixed_args(argv[1:], argparse.Namespace(verb=argv[0]))
    return parser.parse_args(argv or ["--help"])


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print and exit with."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += "; keys of the recipe are set without dashes: key.path=value"
        raise UsageError(f"{message}\n{self.format_usage().rstrip()}")


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command's parser, and each verb's own."""
    parser = _Parser(
        prog="longnet",
        description="Train language models with LongNet and its rivals, from recipes.",
        epilog="`longnet VERB --help` says more about one of them.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"longnet_kit {longnet_kit.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    recipe = ("recipe", "a recipe file, or the name of a shipped recipe (see `longnet list`)")
    run = ("run", "a run directory, runs/<name> for its newest finished version, or a recipe whose run is there")
    overrides = ("overrides", "key.path=value", "sets a key of the recipe, like model.layers=2; the value is YAML")
    options = ("options", "key=value", "an argument of the backend; imports=[module] imports a plug-in first")
    made: dict[str, argparse.ArgumentParser] = {}

    def verb(
        name: str, words: str, subject: tuple[str, str] | None = None, rest: Any = None
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".", allow_abbrev=False)
        if subject is not None:
            sub.add_argument(subject[0], metavar=subject[0].upper(), help=subject[1])
        if rest is not None:
            sub.add_argument(rest[0], metavar=rest[1], nargs="*", help=rest[2])
        made[name] = sub
        return sub

    verb("fit", "train what a recipe says", recipe, overrides)
    verb("validate", "measure a run's newest checkpoint on the validation split", run, overrides)
    verb("test", "measure a run's newest checkpoint on the test split", run, overrides)
    exported = verb("export", "write a run's weights and recipe into one safetensors file", run)
    exported.add_argument("output", metavar="OUT", type=Path, help="a .safetensors file")
    exported.add_argument(
        "--checkpoint", metavar="FILE", type=Path, help="which of the run's checkpoints; by default the newest"
    )
    verb("list", "name every recipe, with a line on it")
    verb("show", "print a recipe in full, its parameter count and its FLOPs", recipe, overrides)
    planned = ("overrides", "devices=N gpu=NAME key.path=value", "how many devices in all; h100, h200 or a100; keys")
    verb("plan", "say what a run will cost each device, before anything is run", recipe, planned)
    drawn = ("overrides", "length=N key.path=value", "tokens in the drawn sequence, by default 16; keys of the recipe")
    pattern = verb("pattern", "draw who attends to whom, per branch and head, and mixed", recipe, drawn)
    pattern.add_argument("--output", type=Path, metavar="FILE", help="also draw a figure: a .png, .pdf or .svg file")
    swept = ("recipe", f"{recipe[1]}; or a folder, for every recipe in it")
    grid = (
        "overrides",
        "RECIPE key.path=a,b,c",
        "more recipes; and values to try: one run for each combination, or a single value for all",
    )
    verb("sweep", "train recipes once for each combination of values; goes on where it was", swept, grid)
    runs = ("runs", "RUN", "run directories, folders of them, or patterns like 'runs/*'; by default all in runs/")
    _add_comparison(verb("compare", "hold runs against each other, in a table and a plot", rest=runs))
    board = verb("board", "start TensorBoard on runs/ and print its address")
    board.add_argument("directory", metavar="DIRECTORY", nargs="?", type=Path, default=Path("runs"), help="of runs")
    board.add_argument("--port", type=int, default=None, help="by default the first free one from 6006; 0 for any")
    board.add_argument("--host", default="localhost", help="the address to listen on; 0.0.0.0 for all of the machine's")
    trained = ("run", "a run directory, runs/<name>, a recipe whose run is there, or an exported file")
    _add_generation(verb("generate", "continue prompts with what a run has learnt", trained))
    read = ("files", "FILE", "files or patterns: text, code or JSON lines")
    _add_stream(verb("stream", "read text of any size as one sequence, and measure it", trained, read))
    backend = ("name", "a registered attention backend")
    verb("check-backend", "hold an attention backend to the definition", backend, options)
    for name in ("fit", "validate", "test", "export", "generate", "stream"):
        words = "let a run from outside the working directory import the modules that its recipe names"
        made[name].add_argument("--trust", action="store_true", help=words)
    return parser, made


def _add_generation(generate: argparse.ArgumentParser) -> None:
    several = {"action": "append", "default": []}
    generate.add_argument("--prompt", metavar="TEXT", help="may be repeated: one batch", **several)
    generate.add_argument("--prompt-file", metavar="FILE", help="a text file, of any length; - for stdin", **several)
    generate.add_argument("--max-new-tokens", type=_count, metavar="N", default=256, help="at most, per text; 256")
    generate.add_argument("--temperature", type=float, metavar="T", default=1.0, help="1; 0 takes the likeliest token")
    generate.add_argument("--top-k", type=_count, metavar="K", help="draw from the K likeliest tokens alone")
    generate.add_argument("--top-p", type=float, metavar="P", default=1.0, help="from those that make up P together")
    generate.add_argument("--seed", type=int, metavar="S", default=0, help="text i draws with seed S + i; 0")
    generate.add_argument("--samples", type=_count, metavar="N", default=1, help="texts for each prompt; 1")
    generate.add_argument("--stop", metavar="TEXT", help="ends the text; may be repeated", **several)
    generate.add_argument("--echo", action="store_true", help="print the prompt too")
    generate.add_argument("--json", action="store_true", help="print an object per text: prompt, text, tokens, end")
    _add_device(generate)


def _add_stream(stream: argparse.ArgumentParser) -> None:
    stream.add_argument("--tokens", type=_count, metavar="N", help="where to end; by default where the files do")
    stream.add_argument("--repeat", action="store_true", help="read the files again where they end before that")
    stream.add_argument(
        "--extend", action="store_true", help="add branches by doubling the longest, until a token sees all before it"
    )
    stream.add_argument("--errors", choices=("strict", "replace", "skip"), default="strict", help="text not in UTF-8")
    stream.add_argument("--output", type=Path, metavar="DIRECTORY", help="of results and state; by default in the run")
    _add_device(stream)


def _add_device(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--chunk", type=_count, metavar="N", default=CHUNK, help=f"tokens read at a time; {CHUNK:,}")
    verb.add_argument("--max-cached", type=_count, metavar="N", help="limit of a cache that keeps every token; 65,536")
    verb.add_argument("--device", choices=("cpu", "cuda"), help="by default the recipe's accelerator, if it is there")


def _count(text: str) -> int:
    """A whole number from 1, written as 1000000, 1_000_000 or 1,000,000."""
    digits = text.replace("_", "").replace(",", "")
    if not (digits.isascii() and digits.isdigit() and int(digits)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(digits)


def _add_comparison(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("--sort", metavar="TAG", help="the metric that orders the runs; by default val/loss")
    compare.add_argument("--metric", metavar="TAG", action="append", default=[], help="show this one; may be repeated")
    compare.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves: a .png, .pdf or .svg file")
    compare.add_argument(
        "--against",
        choices=("steps", "tokens", "flops", "seconds", "groups"),
        default="steps",
        help="what the plot's curves are over; groups: the last values of the tags METRIC@N, over N",
    )
    compare.add_argument("--csv", type=Path, metavar="FILE", help="write the table in full precision")
    compare.add_argument("--markdown", action="store_true", help="print the table as Markdown")
