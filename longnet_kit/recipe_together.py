"""How the keys of a recipe must go together; what each allows by itself is in recipe_schema and the registries."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from datetime import timedelta
from typing import Any

from longnet_kit import recipe_schema as schema
from longnet_kit import recipe_strategy
from longnet_kit.recipe_strategy import mapping_at, whole_number
from longnet_kit.typed import Problem

Values = dict[str, Any]


def problems(values: Values) -> list[tuple[tuple[str, ...], Problem]]:
    """Of keys that do not go together: which ones are involved, the first of them named by the problem."""
    found: list[tuple[tuple[str, ...], Problem]] = []

    def check(wrong: bool, message: str, *keys: str) -> None:
        if wrong:
            found.append((keys, Problem(keys[0], message)))

    model, data = mapping_at(values, "model"), mapping_at(values, "data")
    name = values.get("name")
    if isinstance(name, str):
        fits = re.fullmatch(r"\w[\w.+-]{0,99}", name) and ".." not in name
        allowed = "it names a folder: letters, digits, and . + - _ after the first, at most 100 of them"
        check(not fits, f"got {name!r}; {allowed}", "name")
    check("\n" in str(values.get("description", "")), "has several lines, expected one", "description")
    dim, heads, positions = whole_number(model.get("dim")), whole_number(model.get("heads")), model.get("positions")
    if dim and heads:
        rest = f"with model.heads: {heads}; dim must be a multiple of heads, {_multiples(dim, heads)}"
        check(dim % heads != 0, f"got {dim} {rest}", "model.dim", "model.heads")
        odd = dim % heads == 0 and dim // heads % 2 == 1 and positions in ("rope", "xpos")
        each = f"but heads have {dim // heads} (dim {dim} / heads {heads})"
        remedy = "choose dim and heads so that dim / heads is even, or positions: none"
        message = f"got {positions!r}, which turns pairs of dimensions, {each}; {remedy}"
        check(odd, message, "model.positions", "model.dim", "model.heads")
    acausal, task = model.get("causal") is False, values.get("task")
    seen = acausal and _predicts_tokens(task)
    told = f"got false, but {task} predicts the next token, which such a model sees; set it to true"
    check(seen, told, "model.causal", "task")
    xpos = "got 'xpos' with model.causal: false; its decay becomes growth towards later tokens: use rope or none"
    check(acausal and not seen and positions == "xpos", xpos, "model.positions", "model.causal")
    contexts = data.get("eval_contexts")
    if isinstance(contexts, list):
        twice = sorted(c for c, times in Counter(c for c in contexts if isinstance(c, int)).items() if times > 1)
        check(bool(twice), f"got {contexts}, in which {twice} stand twice; list each length once", "data.eval_contexts")
    found += recipe_strategy.problems(values)
    trainer = mapping_at(values, "trainer")
    precision, devices = trainer.get("precision"), trainer.get("devices")
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    engine = f"got {precision!r}, which needs the package transformer_engine: install it, or use bf16-mixed"
    check(str(precision).startswith("transformer-engine") and not has_engine, engine, "trainer.precision")
    vanished = _vanished_eps(precision, mapping_at(values, "optimizer"))
    check(bool(vanished), vanished, "trainer.precision", "optimizer.eps", "optimizer.name")
    listed = trainer.get("accelerator") == "cpu" and isinstance(devices, list)
    check(listed, schema.listed_on_cpu(devices), "trainer.devices", "trainer.accelerator")
    too_long = _time_problem(trainer.get("max_time"))
    check(bool(too_long), too_long, "trainer.max_time")
    for key in ("init_from", "resume"):
        path = values.get(key)
        if isinstance(path, str) and not (key == "resume" and path == "auto"):
            other = "null, auto or " if key == "resume" else "null or "
            message = f"got {path!r}, but nothing is there; expected {other}a run directory or a checkpoint"
            check(not path or not os.path.exists(path), message, key)
    both = values.get("init_from") is not None and values.get("resume") not in (None, "auto")
    check(both, "a resumed run has its weights already; leave out one of init_from and resume", "init_from", "resume")
    return found


def _predicts_tokens(task: Any) -> bool:
    """Whether a task's network is asked for next tokens; a plug-in's that does not say so is taken to know better."""
    from longnet_kit import tasks

    return not tasks.registry.refusal(task) and getattr(tasks.registry.get(task), "predicts_tokens", False)


def _vanished_eps(precision: Any, optimizer: Values) -> str:
    """What is wrong with an optimizer whose eps is 0 in the dtype of the weights; empty when nothing is."""
    from longnet_kit.model import weight_dtype
    from longnet_kit.tasks import optimization

    name, eps = optimizer.get("name"), optimizer.get("eps")
    if not (isinstance(precision, str) and isinstance(name, str) and isinstance(eps, (int, float)) and 0 < eps <= 1000):
        return ""  # reported by itself
    problem = optimization.eps_problem(name, eps, weight_dtype(precision))
    return problem and f"got {precision!r} with optimizer.eps {eps:g}, {problem}, or 16-mixed or bf16-true here"


def _time_problem(given: Any) -> str:
    """What is wrong with a length of time, in text or as a mapping; empty when nothing is."""
    if isinstance(given, str):
        parts = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", given.strip())
        if parts is None:
            return f"got {given!r}, expected days, hours, minutes and seconds, like 00:12:30:00, or {{hours: 12.5}}"
        given = dict(zip(("days", "hours", "minutes", "seconds"), map(float, parts.groups()), strict=True))
    try:
        timedelta(**given or {})
    except (OverflowError, ValueError):  # too many days, or infinitely many
        return f"got {given}, which is longer than {timedelta.max.days:,} days; leave it out for no limit"
    except TypeError:
        pass  # told of by itself
    return ""


def _multiples(dim: int, heads: int) -> str:
    below = dim // heads * heads
    return f"like {below} or {below + heads}" if below else f"like {heads}"
