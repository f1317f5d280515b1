"""`${key.path}` in a recipe stands for another key; resolved by OmegaConf, with its errors as problems."""

from __future__ import annotations

import re
from typing import Any

from longnet_kit.typed import Problem, join

_RULE = "${key.path} stands for another key of the recipe, and \\${ for the characters themselves"


def resolve(values: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Replace every interpolation by what it stands for; what cannot be replaced becomes null and a problem."""
    if "${" not in repr(values):
        return values, []
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems: list[Problem] = []

    def complain(key: str, reason: object) -> None:
        problems.append(Problem(key, f"{str(reason).splitlines()[0]}; {_RULE}"))

    def well_formed(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: well_formed(item, join(key, name)) for name, item in value.items()}
        if isinstance(value, list):
            return [well_formed(item, f"{key}[{i}]") for i, item in enumerate(value)]
        try:
            OmegaConf.create([value])
        except OmegaConfBaseException as error:
            complain(key, f"got {value!r}: {error}")
            return None
        return value

    def resolved(container: Any, name: Any, key: str) -> Any:
        try:
            value = container[name]
        except (OmegaConfBaseException, RecursionError) as error:
            complain(key, error)
            return None
        if OmegaConf.is_dict(value):
            return {str(n): resolved(value, n, join(key, str(n))) for n in value}
        if OmegaConf.is_list(value):
            return [resolved(value, i, f"{key}[{i}]") for i in range(len(value))]
        return value

    config = OmegaConf.create(well_formed(values, ""))
    return {str(name): resolved(config, name, str(name)) for name in config}, problems


def escape(value: Any) -> Any:
    """Keep `${` in text from being read as an interpolation."""
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
