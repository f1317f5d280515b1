"""`${key.path}` in a recipe stands for another key; resolved by OmegaConf, with its errors as problems.

OmegaConf computes a key anew wherever it is asked for, so that a few keys that each stand for several others can ask
for more than any machine holds. What goes in and what comes out is therefore limited.
"""

from __future__ import annotations

import re
from typing import Any

from longnet_kit.recipe_yaml import check_size
from longnet_kit.typed import Problem, join

LONGEST = 1000
"""Of a text with an interpolation, in characters."""
JOINED = 20
"""How many interpolations there may be in texts that hold several."""
_RULE = "${key.path} stands for another key of the recipe, and \\${ for the characters themselves"


def resolve(values: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Replace every interpolation by what it stands for; what cannot be replaced becomes null and a problem.

    Raises:
        Excess: the result is larger than any recipe.
    """
    if "${" not in repr(values):
        return values, []
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems: list[Problem] = []
    joined = count = 0
    open_nodes: list[Any] = []

    def complain(key: str, reason: object) -> None:
        problems.append(Problem(key, f"{str(reason).splitlines()[0]}; {_RULE}"))

    def well_formed(value: Any, key: str) -> Any:
        nonlocal joined
        if isinstance(value, dict):
            return {name: well_formed(item, join(key, name)) for name, item in value.items()}
        if isinstance(value, list):
            return [well_formed(item, f"{key}[{i}]") for i, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        times = value.count("${")
        joined += times if times > 1 else 0
        if len(value) > LONGEST or joined > JOINED:
            most = f"at most {LONGEST:,} characters, and {JOINED} interpolations in all texts that have several"
            complain(key, f"got {value[:60]!r}..., in all {len(value):,} characters; expected {most}")
            return None
        try:
            OmegaConf.create([value])
        except (OmegaConfBaseException, RecursionError) as error:
            complain(key, f"got {value!r}: {error}")
            return None
        return value

    def resolved(container: Any, name: Any, key: str) -> Any:
        nonlocal count
        try:
            value = container[name]
        except (OmegaConfBaseException, RecursionError) as error:
            complain(key, error)
            return None
        if not OmegaConf.is_config(value):
            count += 1
            check_size(0, count)
            return value
        if any(value is node for node in open_nodes):
            complain(key, "it stands for a mapping or list that it is in itself")
            return None
        open_nodes.append(value)
        count += 1
        check_size(len(open_nodes), count)
        if OmegaConf.is_dict(value):
            made: Any = {str(n): resolved(value, n, join(key, str(n))) for n in value}
        else:
            made = [resolved(value, i, f"{key}[{i}]") for i in range(len(value))]
        open_nodes.pop()
        return made

    config = OmegaConf.create(well_formed(values, ""))
    return {str(name): resolved(config, name, str(name)) for name in config}, problems


def escape(value: Any) -> Any:
    """Keep `${` in text from being read as an interpolation."""
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
