"""Tasks: LightningModules around a network, by registry; each says what is learnt and what is measured."""

from __future__ import annotations

from lightning import LightningModule

from longnet_kit.registry import Registry

registry: Registry[LightningModule] = Registry("task", "task", group="longnet_kit.tasks")
register = registry.register
names = registry.names

from longnet_kit.tasks.classification import Classification  # noqa: E402  (registers itself)
from longnet_kit.tasks.in_context import InContext  # noqa: E402  (as does this)
from longnet_kit.tasks.language_modeling import LanguageModeling  # noqa: E402  (registers itself)

__all__ = ["Classification", "InContext", "LanguageModeling", "names", "register", "registry"]
