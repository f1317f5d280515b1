"""One sequence on many devices: strategies for Lightning's Trainer, and what they stand on.

`SequenceParallelStrategy` (DDP) and `SequenceParallelFSDPStrategy` (FSDP2) divide each sequence among the ranks of a
group. Importing this registers them as Trainer strategies `sequence_parallel` and `sequence_parallel_fsdp`.
"""

from __future__ import annotations

from lightning.pytorch.strategies import StrategyRegistry

from longnet_kit.parallel.agreement import agree, check_same, connect, together
from longnet_kit.parallel.fsdp import SequenceParallelFSDPStrategy
from longnet_kit.parallel.strategies import SequenceParallelStrategy, is_started_by_others

__all__ = [
    "SequenceParallelFSDPStrategy",
    "SequenceParallelStrategy",
    "agree",
    "check_same",
    "connect",
    "is_started_by_others",
    "together",
]

for _strategy in (SequenceParallelStrategy, SequenceParallelFSDPStrategy):
    if _strategy.strategy_name not in StrategyRegistry:
        StrategyRegistry.register(_strategy.strategy_name, _strategy, (_strategy.__doc__ or "").partition("\n")[0])
