"""The command `longnet VERB ...`: parses the arguments and calls one function of the package.

Exit codes: 0 done, 2 the user's error (one message on stderr), 1 a fault (with its traceback, unless it is that another
rank of the job was lost), 130 interrupted, 141 the reader of the output is gone. Everything heavy is imported by the
verb that needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import longnet_kit
from longnet_kit import typed

DONE, FAULT, USER_ERROR, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141


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
        arguments = _parser().parse_args(_known_verb(sys.argv[1:] if argv is None else argv))
        code = arguments.call(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as end:  # argparse, after --help
        return int(end.code or 0)
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


def _fit(arguments: argparse.Namespace) -> int:
    from longnet_kit import experiment, recipe

    experiment.run(recipe.load(arguments.recipe, arguments.overrides))
    return DONE


def _evaluate(arguments: argparse.Namespace) -> int:
    from longnet_kit import experiment

    experiment.evaluate(arguments.run, arguments.overrides, which=arguments.verb)
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
    devices = asked.get("devices")
    if devices is not None and not (devices.isascii() and devices.isdigit()):
        raise UsageError(f"devices={devices}: expected a whole number, of all devices together")
    from longnet_kit import plan

    made = plan.plan(
        arguments.recipe, overrides, devices=None if devices is None else int(devices), gpu=asked.get("gpu")
    )
    print(plan.render(made))
    return DONE


def _check_backend(arguments: argparse.Namespace) -> int:
    from longnet_kit import recipe

    options = recipe.parse_options(arguments.options)
    from longnet_kit import testing

    return testing.main_check(arguments.name, options)


def _is_lost_rank(error: RuntimeError) -> bool:
    from longnet_kit.parallel.strategies import is_about_transfers

    return is_about_transfers(error)


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print and exit with."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += "; keys of the recipe are set without dashes: key.path=value"
        raise UsageError(f"{message}\n{self.format_usage().rstrip()}")


def _parser() -> argparse.ArgumentParser:
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

    def verb(name: str, call: Any, words: str, subject: tuple[str, str] | None = None, rest: Any = None) -> None:
        sub = verbs.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".", allow_abbrev=False)
        if subject is not None:
            sub.add_argument(subject[0], metavar=subject[0].upper(), help=subject[1])
        if rest is not None:
            sub.add_argument(rest[0], metavar=rest[1], nargs="*", help=rest[2])
        sub.set_defaults(call=call)

    verb("fit", _fit, "train what a recipe says", recipe, overrides)
    verb("validate", _evaluate, "measure a run's newest checkpoint on the validation split", run, overrides)
    verb("test", _evaluate, "measure a run's newest checkpoint on the test split", run, overrides)
    verb("list", _list, "name every recipe, with a line on it")
    verb("show", _show, "print a recipe in full, its parameter count and its FLOPs", recipe, overrides)
    planned = ("overrides", "devices=N gpu=NAME key.path=value", "how many devices in all; h100, h200 or a100; keys")
    verb("plan", _plan, "say what a run will cost each device, before anything is run", recipe, planned)
    backend = ("name", "a registered attention backend")
    verb("check-backend", _check_backend, "hold an attention backend to the definition", backend, options)
    return parser


VERBS = ("fit", "validate", "test", "list", "show", "plan", "check-backend")


def _known_verb(argv: Sequence[str]) -> list[str]:
    """The arguments, after a look at the verb: argparse would not say which one was meant."""
    argv = list(argv)
    if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
        raise UsageError(f"there is no verb {argv[0]!r}; {typed.suggestion(argv[0], VERBS)}")
    return argv or ["--help"]


def _is_ours(error: ValueError) -> bool:
    """Whether the kit raised the error, which then says what the user did; a library's own is a fault."""
    if isinstance(error, UsageError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("longnet_kit.")


if __name__ == "__main__":
    sys.exit(main())
