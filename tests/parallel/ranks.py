"""Starting the ranks of a job as processes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(count: int, module: str, *arguments: str, cwd: Path | None = None) -> list[subprocess.Popen[str]]:
    """Start `python -m module arguments` once for each rank, with the variables that Lightning reads ranks from."""
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=shared | {"LOCAL_RANK": str(rank)},
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]


def finish(ranks: Sequence[subprocess.Popen[str]], timeout: float = 280) -> list[str]:
    """Wait for all; their output. An AssertionError shows it where a rank failed."""
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    codes = [rank.returncode for rank in ranks]
    assert codes == [0] * len(ranks), f"exit codes {codes}\n" + "\n".join(outputs)
    return outputs
