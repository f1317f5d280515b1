"""What a recipe's run will cost each device, before anything is run."""

from __future__ import annotations

from longnet_kit.plan.estimate import Exchange, Plan, of, plan
from longnet_kit.plan.text import render

__all__ = ["Exchange", "Plan", "of", "plan", "render"]
