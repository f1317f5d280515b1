"""The command `longnet VERB ...`: calls one function of the package for the arguments that it was given.

Exit codes: 0 done, 2 the user's error (one message on stderr), 1 a fault (with its traceback, unless it is that another
rank of the job was lost, or that a loss or gradient was not finite), 141 the reader of the output is gone (fit, sweep
and stream go on without it), 128 + n when signal n ended it: 129 SIGHUP, 130 SIGINT, 138 SIGUSR1, 143 SIGTERM.
Everything heavy is imported by the verb that needs it.
"""

from __future__ import annotations

import argparse
import atexit
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NoReturn

from longnet_kit import cli_arguments, terminal
from longnet_kit.errors import UserError

DONE, FAULT, USER_ERROR, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141
OUTLIVING = ("fit", "sweep", "stream")
"""Verbs that go on when the reader of their output is gone."""


def command() -> NoReturn:
    """Run the command as a process of its own."""
    terminal.open_closed()
    code = main()
    if _has_foreign_threads():
        _end_at_once(code)
    sys.exit(code)


def _has_foreign_threads() -> bool:
    """Whether threads of C++ may still need the interpreter when its work is done.

    One of gloo's may have to let go of its last tensor; where the interpreter is ending, it aborts the process. Those
    of gRPC, through which TensorBoard reads its runs, may be waited for without end.
    """
    if "tensorboard.program" in sys.modules:
        return True
    if "torch.distributed" not in sys.modules:
        return False
    from torch import distributed as dist

    return dist.is_available() and dist.is_initialized()


def _end_at_once(code: int) -> None:
    """End the process without taking the interpreter apart."""
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the command's name; by default those of the process.

    Returns:
        The exit code. A fault is raised instead, so that the interpreter shows its traceback and exits with 1.
    """
    with terminal.outliving("stderr"), ExitStack() as held:
        return _run(list(sys.argv[1:] if argv is None else argv), held)


def _run(argv: list[str], held: ExitStack) -> int:
    """Run the command; `held` is open as long as anything is printed."""
    try:
        arguments = cli_arguments.parse(argv)
        if arguments.verb in OUTLIVING:
            held.enter_context(terminal.outliving())
        if getattr(arguments, "trust", False):
            from longnet_kit import plugins

            held.enter_context(plugins.trusted())
        code = _CALLS[arguments.verb](arguments)
        sys.stdout.flush()
        return code
    except SystemExit as end:  # argparse, after --help; or Lightning, which hides what Ctrl-C raises
        return INTERRUPTED if isinstance(end.__context__, KeyboardInterrupt) else int(end.code or 0)
    except KeyboardInterrupt as error:  # a sweep's has the number of its signal
        terminal.tell("interrupted")
        return 128 + getattr(error, "signum", signal.SIGINT)
    except BrokenPipeError:
        # What is buffered still would be written at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except UserError as error:
        terminal.tell(f"longnet: {error}")
        _publish_refusal(error)
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


def _publish_refusal(error: UserError) -> None:
    """End the other ranks of a job too, where this process is one of them and they wait for it."""
    if "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ:
        from longnet_kit.parallel import refusals

        refusals.publish(str(error))


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

    terminal.say(recipe_list.table())
    return DONE


def _show(arguments: argparse.Namespace) -> int:
    from longnet_kit import recipe

    r = recipe.load(arguments.recipe, arguments.overrides)
    from longnet_kit import experiment

    terminal.say(experiment.show(r), is_data=True)
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
    terminal.say(plan.render(made))
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

    terminal.say(pattern.draw(r, length, arguments.output))
    return DONE


def _sweep(arguments: argparse.Namespace) -> int:
    from longnet_kit import sweep

    more = [item for item in arguments.overrides if "=" not in item]
    return sweep.sweep([arguments.recipe, *more], [item for item in arguments.overrides if "=" in item])


def _compare(arguments: argparse.Namespace) -> int:
    from longnet_kit.report import compare

    terminal.say(
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


def _generate(arguments: argparse.Namespace) -> int:
    from longnet_kit.inference import console
    from longnet_kit.inference.sampling import Sampling

    console.run(
        arguments.run, arguments.prompt, arguments.prompt_file, max_new_tokens=arguments.max_new_tokens,
        sampling=Sampling(arguments.temperature, arguments.top_k, arguments.top_p), seed=arguments.seed,
        samples=arguments.samples, stop=arguments.stop, chunk=arguments.chunk, max_cached=arguments.max_cached,
        echo=arguments.echo, as_json=arguments.json, device=arguments.device,
    )  # fmt: skip
    return DONE


def _stream(arguments: argparse.Namespace) -> int:
    from longnet_kit.inference import stream

    result = stream.stream(
        arguments.run, arguments.files, tokens=arguments.tokens, repeat=arguments.repeat, extend=arguments.extend,
        chunk=arguments.chunk, errors=arguments.errors, max_cached=arguments.max_cached, output=arguments.output,
        device=arguments.device,
    )  # fmt: skip
    return 128 + result.signum if result.signum else DONE


def _check_backend(arguments: argparse.Namespace) -> int:
    from longnet_kit import recipe

    options = recipe.parse_options(arguments.options)
    from longnet_kit import testing

    return testing.main_check(arguments.name, options)


_CALLS: dict[str, Callable[[argparse.Namespace], int]] = {
    "fit": _fit, "validate": _evaluate, "test": _evaluate, "export": _export, "list": _list, "show": _show,
    "plan": _plan, "pattern": _pattern, "sweep": _sweep, "compare": _compare, "board": _board,
    "generate": _generate, "stream": _stream,
    "check-backend": _check_backend,
}  # fmt: skip


def _whole_number(item: str, what: str) -> int:
    value = item.partition("=")[2]
    if not re.fullmatch("[0-9]{1,18}", value):
        raise cli_arguments.UsageError(f"{item}: expected a whole number, of {what}")
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
        terminal.tell(f"longnet: {error}")
    if was_started_by_a_rank():
        return DONE  # the rank that started this one ends the job with the code; a code of ours would have it killed
    return 128 + error.signum if isinstance(error, Interrupted) else FAULT


if __name__ == "__main__":
    command()
