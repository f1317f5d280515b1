"""One rank of two that train plain Lightning code: `python -m tests.parallel.plain STRATEGY FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from tests.parallel.test_strategies import fit

if __name__ == "__main__":
    module = fit(sys.argv[1], 2)
    found = {"seen": module.seen, "drawn": module.drawn, "gradients": module.gradients}
    torch.save(found, Path(sys.argv[2]) / f"{os.environ['LOCAL_RANK']}.pt")
