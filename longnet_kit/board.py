"""TensorBoard on a folder of runs, started from here and stopped with it."""

from __future__ import annotations

import io
import logging
import time
from contextlib import redirect_stderr
from pathlib import Path

from longnet_kit import runs, terminal
from longnet_kit.errors import UserError

LOOKING = 0.5
"""Seconds between looks for a Ctrl-C: one that another thread took in the kernel does not end a wait of this one."""


def serve(directory: Path, host: str = "localhost", port: int | None = None) -> None:
    """Start TensorBoard, print its address, and stay until interrupted.

    Args:
        directory: a folder with run directories in it, at any depth.
        host: the address to listen on.
        port: None for the first free one from 6006, 0 for any free one.

    Raises:
        UserError: there is no such directory, or the port cannot be had.
    """
    address, found = start(directory, host, port)
    runs_found = f"{found} run{'' if found == 1 else 's'}"
    try:
        terminal.say(f"TensorBoard on {directory}, {runs_found}: {address}  (Ctrl-C ends it)")
        while True:
            time.sleep(LOOKING)
    except KeyboardInterrupt:
        print()


def start(directory: Path, host: str = "localhost", port: int | None = None) -> tuple[str, int]:
    """Start TensorBoard in threads of this process.

    Returns:
        Its address, and how many runs there are.

    Raises:
        UserError: as `serve`.
    """
    from tensorboard import program

    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; train a run first, or give a folder of run directories")
    if port is not None and not 0 <= port < 2**16:
        raise UserError(f"--port: {port} is no port; give a number from 0 to 65535")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    server = program.TensorBoard()
    wanted = [] if port is None else [f"--port={port}"]
    server.configure(argv=["tensorboard", f"--logdir={directory}", f"--host={host}", *wanted])
    said = io.StringIO()  # an advertisement, or, before an exit, what is wrong
    try:
        with redirect_stderr(said):
            address = server.launch()
    except (program.TensorBoardServerException, SystemExit) as error:
        why = getattr(error, "msg", "") or said.getvalue().strip().rpartition("\n")[2]
        where = host if port is None else f"{host}, port {port}"
        raise UserError(f"TensorBoard does not start on {where}: {why}") from error
    return address, sum(1 for _ in directory.rglob(runs.RECIPE))
