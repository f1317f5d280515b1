"""The command `longnet VERB ...`: parses the arguments and calls one function of the package.

Exit codes: 0 done, 2 the user's error (one message on stderr), 1 a fault (with its traceback, unless it is that another
rank of the job was lost, or that a loss or gradient was not finite), 141 the reader of the output is gone, 128 + n when
signal n ended it: 130 SIGINT, 138 SIGUSR1, 143 SIGTERM. Everything heavy is imported by the verb that needs it.
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import longnet_kit
from longnet_kit import typed

DONE, FAULT, USER_ERROR, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141


def command() -> NoReturn:
    """Run the command as a process of its own."""
    code = main()
    if "torch.distributed" in sys.modules:
        _end_rank(code)
    sys.exit(code)


def _end_rank(code: int) -> None:
    """End one process of several before the interpreter does.

    A thread of gloo's may still have to let go of its last tensor, for which it needs the interpreter; where that is
    ending, the thread aborts the process, after all its work is done.
    """
    from torch import distributed as dist

    if dist.is_available() and dist.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class UsageError(ValueError):
    """Arguments that the command does not take."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the command's name; by default those of the process.

    Returns:
        The exit code. A fault is raised instead, so that the interpreter shows its traceback and exits with 1.
    """
    try:
        arguments = _arguments(list(sys.argv[1:] if argv is None else argv))
        code = arguments.call(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as end:  # argparse, after --help; or Lightning, which hides what Ctrl-C raises
        return INTERRUPTED if isinstance(end.__context__, KeyboardInterrupt) else int(end.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # What is buffered still would be written at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except ValueError as error:
        if not _is_ours(error):
            raise
        print(f"longnet: {error}", file=sys.stderr)
        return USER_ERROR
    except RuntimeError as error:
        if "torch.distributed" not in sys.modules or not _is_lost_rank(error):
            raise
        return FAULT  # the strategy has said which rank ends and why; where it waited is of no interest
    except Exception as error:
        code = _ended_in_training(error)
        if code is None:
            raise
        return code


def _fit(arguments: argparse.Namespace) -> int:
    from longnet_kit import experiment, recipe

    experiment.run(recipe.load(arguments.recipe, arguments.overrides))
    return DONE


def _evaluate(arguments: argparse.Namespace) -> int:
    from longnet_kit import experiment

    experiment.evaluate(arguments.run, arguments.overrides, which=arguments.verb)
    return DONE


def _export(arguments: argparse.Namespace) -> int:
    from longnet_kit import export

    export.export(arguments.run, arguments.output, arguments.checkpoint)
    return DONE


def _list(arguments: argparse.Namespace) -> int:
    from longnet_kit import recipe_list

    print(recipe_list.table())
    return DONE


def _show(arguments: argparse.Namespace) -> int:
    from longnet_kit import recipe

    r = recipe.load(arguments.recipe, arguments.overrides)
    from longnet_kit import experiment

    print(experiment.show(r))
    return DONE


def _plan(arguments: argparse.Namespace) -> int:
    asked: dict[str, str] = {}
    overrides = []
    for item in arguments.overrides:
        key, equals, value = item.partition("=")
        if key in ("devices", "gpu") and equals:
            asked[key] = value
        else:
            overrides.append(item)
    devices = None
    if "devices" in asked:
        devices = _whole_number(f"devices={asked['devices']}", "all devices together")
    from longnet_kit import plan

    made = plan.plan(arguments.recipe, overrides, devices=devices, gpu=asked.get("gpu"))
    print(plan.render(made))
    return DONE


def _pattern(arguments: argparse.Namespace) -> int:
    from longnet_kit import recipe

    length, overrides = 16, []
    for item in arguments.overrides:
        if item.startswith("length="):
            length = _whole_number(item, "tokens in the sequence that is drawn")
        else:
            overrides.append(item)
    r = recipe.load(arguments.recipe, overrides)
    from longnet_kit.report import pattern

    print(pattern.draw(r, length, arguments.output))
    return DONE


def _sweep(arguments: argparse.Namespace) -> int:
    from longnet_kit import sweep

    return sweep.sweep(arguments.recipe, arguments.overrides)


def _compare(arguments: argparse.Namespace) -> int:
    from longnet_kit.report import compare

    print(
        compare.compare(
            arguments.runs, sort=arguments.sort, metrics=arguments.metric, plot=arguments.plot,
            against=arguments.against, csv=arguments.csv, markdown=arguments.markdown,
        )
    )  # fmt: skip
    return DONE


def _board(arguments: argparse.Namespace) -> int:
    from longnet_kit import board

    board.serve(arguments.directory, arguments.host, arguments.port)
    return DONE


def _check_backend(arguments: argparse.Namespace) -> int:
    from longnet_kit import recipe

    options = recipe.parse_options(arguments.options)
    from longnet_kit import testing

    return testing.main_check(arguments.name, options)


def _whole_number(item: str, what: str) -> int:
    value = item.partition("=")[2]
    if not (value.isascii() and value.isdigit()):
        raise UsageError(f"{item}: expected a whole number, of {what}")
    return int(value)


def _is_lost_rank(error: RuntimeError) -> bool:
    from longnet_kit.parallel.strategies import is_about_transfers

    return is_about_transfers(error)


def _ended_in_training(error: Exception) -> int | None:
    """The exit code of a training that a signal has ended, or a value that is not finite; None for other errors."""
    if "longnet_kit.fitting" not in sys.modules:
        return None
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    from longnet_kit.callbacks import NonFiniteError
    from longnet_kit.parallel.strategies import was_started_by_a_rank
    from longnet_kit.signals import Interrupted

    if not isinstance(error, (Interrupted, NonFiniteError)):
        return None
    if rank_zero_only.rank == 0:
        print(f"longnet: {error}", file=sys.stderr)
    if was_started_by_a_rank():
        return DONE  # the rank that started this one ends the job with the code; a code of ours would have it killed
    return 128 + error.signum if isinstance(error, Interrupted) else FAULT


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print and exit with."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += "; keys of the recipe are set without dashes: key.path=value"
        raise UsageError(f"{message}\n{self.format_usage().rstrip()}")


VERBS = (
    "fit", "validate", "test", "export", "list", "show", "plan", "pattern", "sweep", "compare", "board",
    "check-backend",
)  # fmt: skip


def _arguments(argv: list[str]) -> argparse.Namespace:
    """Parse; options of a verb may stand anywhere after it.

    The verb is looked at first: argparse would not say which one was meant.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
        raise UsageError(f"there is no verb {argv[0]!r}; {typed.suggestion(argv[0], VERBS)}")
    parser, verbs = _parsers()
    if argv and argv[0] in verbs:
        return verbs[argv[0]].parse_intermixed_args(argv[1:], argparse.Namespace(verb=argv[0]))
    return parser.parse_args(argv or ["--help"])


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
    run = ("run", "a run directory, runs/<name> for its newest version, or a recipe whose run is there")
    overrides = ("overrides", "key.path=value", "sets a key of the recipe, like model.layers=2; the value is YAML")
    options = ("options", "key=value", "an argument of the backend; imports=[module] imports a plug-in first")
    made: dict[str, argparse.ArgumentParser] = {}

    def verb(
        name: str, call: Any, words: str, subject: tuple[str, str] | None = None, rest: Any = None
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".", allow_abbrev=False)
        if subject is not None:
            sub.add_argument(subject[0], metavar=subject[0].upper(), help=subject[1])
        if rest is not None:
            sub.add_argument(rest[0], metavar=rest[1], nargs="*", help=rest[2])
        sub.set_defaults(call=call)
        made[name] = sub
        return sub

    verb("fit", _fit, "train what a recipe says", recipe, overrides)
    verb("validate", _evaluate, "measure a run's newest checkpoint on the validation split", run, overrides)
    verb("test", _evaluate, "measure a run's newest checkpoint on the test split", run, overrides)
    exported = verb("export", _export, "write a run's weights and recipe into one safetensors file", run)
    exported.add_argument("output", metavar="OUT", type=Path, help="a .safetensors file")
    exported.add_argument(
        "--checkpoint", metavar="FILE", type=Path, help="which of the run's checkpoints; by default the newest"
    )
    verb("list", _list, "name every recipe, with a line on it")
    verb("show", _show, "print a recipe in full, its parameter count and its FLOPs", recipe, overrides)
    planned = ("overrides", "devices=N gpu=NAME key.path=value", "how many devices in all; h100, h200 or a100; keys")
    verb("plan", _plan, "say what a run will cost each device, before anything is run", recipe, planned)
    drawn = ("overrides", "length=N key.path=value", "tokens in the drawn sequence, by default 16; keys of the recipe")
    pattern = verb("pattern", _pattern, "draw who attends to whom, per branch and head, and mixed", recipe, drawn)
    pattern.add_argument("--output", type=Path, metavar="FILE", help="also draw a figure: a .png, .pdf or .svg file")
    grid = ("overrides", "key.path=a,b,c", "values to try: one run for each combination; or a single value for all")
    verb("sweep", _sweep, "train a recipe once for each combination of values; goes on where it was", recipe, grid)
    runs = ("runs", "RUN", "run directories, folders of them, or patterns like 'runs/*'; by default all in runs/")
    _add_comparison(verb("compare", _compare, "hold runs against each other, in a table and a plot", rest=runs))
    board = verb("board", _board, "start TensorBoard on runs/ and print its address")
    board.add_argument("directory", metavar="DIRECTORY", nargs="?", type=Path, default=Path("runs"), help="of runs")
    board.add_argument("--port", type=int, default=None, help="by default the first free one from 6006; 0 for any")
    board.add_argument("--host", default="localhost", help="the address to listen on; 0.0.0.0 for all of the machine's")
    backend = ("name", "a registered attention backend")
    verb("check-backend", _check_backend, "hold an attention backend to the definition", backend, options)
    return parser, made


def _add_comparison(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("--sort", metavar="TAG", help="the metric that orders the runs; by default val/loss")
    compare.add_argument("--metric", metavar="TAG", action="append", default=[], help="show this one; may be repeated")
    compare.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves: a .png, .pdf or .svg file")
    compare.add_argument(
        "--against", choices=("steps", "tokens", "seconds"), default="steps", help="what the plot's curves are over"
    )
    compare.add_argument("--csv", type=Path, metavar="FILE", help="write the table in full precision")
    compare.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def _is_ours(error: ValueError) -> bool:
    """Whether the kit raised the error, which then says what the user did; a library's own is a fault."""
    if isinstance(error, UsageError) or type(error).__module__.startswith("longnet_kit."):
        return True  # one of our own may have been raised again by others, like those of a data loader's process
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("longnet_kit.")


if __name__ == "__main__":
    command()
