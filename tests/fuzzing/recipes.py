"""Recipe files and overrides of all kinds: nearly right ones, bombs, and noise."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from longnet_kit import shipped
from tests.fuzzing.mutations import mutated

SMALL = b"""\
name: tiny
description: &d some words
model: &m {dim: 16, layers: 1, heads: 2, attention: {backend: naive, pattern: {kind: dense}}}
data:
  source: files
  paths: [text.txt, "b.jsonl"]
  seq_len: ${model.dim}
  eval_contexts: [4, 8]
optimizer: {lr: 3e-3, betas: [0.9, 0.98]}
trainer: {max_steps: 2, accelerator: cpu, max_time: {hours: 2}}
strategy: {name: sequence_parallel, sequence_parallel_size: 1}
"""
ORIGINALS = [SMALL, *(shipped.find(name).read_bytes() for name in shipped.names())]

PIECES = [
    piece.encode()
    for piece in (
        "&a ", "*a", "*m", "*d", "<<: *m\n", "<<: [*m, *m]\n", "? ", ": ", "- ", "\n- ", "\n  ", "{", "}", "[",
        "]", ",", "|\n", ">\n", "%YAML 1.1\n", "---\n", "...\n", '"', "'", "\t", "#", "!!int ", "!!int 0x",
        "!!float ", "!!bool x", "!!null ", "!!str ", "!!set ", "!!binary x",
        "!!python/object/apply:os.system [touch canary]\n", "!x ", "null", "~", "true", "0", "-1", "9" * 30,
        "1e999", ".nan", "-.inf", "1_0", "0x10", '"\\ud800"', '"\\0"', "\u2028", "\x85", "\ufeff",
        "${model.dim}", "${", "${.}", "${..}", "${a}${b}", "${oc.env:HOME}", "${oc.decode:'[1'}", "\\${",
        "???", "extends: r.yaml\n", "extends: ", "imports: [os]\n", "imports: [a/b]\n", "init_from: ",
        "x" * 300, "a/", "resume: auto\n", "sequence_parallel_size: 2\n", "devices: 1000000007\n", "kind: dilated, ",
        "backend: xformers, ", "model: *m\n", "tokenizer: a.json\n", "tokenizer: ~a/b\n", "[" * 60,
        "{a: " * 60, "x: " * 20,
    )
]  # fmt: skip
"""What YAML and recipes are made of."""

_KEYS = st.sampled_from(
    [
        "model", "data", "optimizer", "trainer", "checkpoint", "strategy", "name", "extends", "imports", "seed", "task",
        "init_from", "resume", "attention", "backend", "pattern", "kind", "source", "paths", "tokenizer", "seq_len",
        "lr", "eval_contexts", "betas", "max_steps", "devices", "max_time", "hours", "sequence_parallel_size", "dim",
        "heads", "a", "<<", "a.b", "a[0]", "a[b", "", "${model.dim}",
    ]
)  # fmt: skip
_SCALARS = st.one_of(
    st.sampled_from([None, True, 0, -1, 10**20, 10**400, float("nan"), float("inf"), 1e-320, "x" * 300, "\0", "00:01"]),
    st.sampled_from(
        ["${model}", "${.}", "${data.paths}", "${a}", "${model.dim}x${model.dim}", "${${a}}", "${model.a}"]
    ),
    st.sampled_from(["r.yaml", "sequence_parallel", "files", "naive", "dilated", "auto", "~a", "/", ".", "a.json"]),
    st.integers(-3, 40),
    st.text(max_size=8),
)
_TREES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_KEYS, inner, max_size=4)),
    max_leaves=12,
)
_SETTINGS = st.builds(
    lambda path, value: f"{'.'.join(path)}={json.dumps(value)}", st.lists(_KEYS, min_size=1, max_size=4), _TREES
)
ITEMS = st.lists(st.one_of(_SETTINGS, st.text(max_size=20), _SETTINGS.map(lambda s: s[1:] + s[:1])), max_size=3)
"""`key.path=value`."""

DOCUMENTS = st.one_of(
    mutated(ORIGINALS, PIECES),
    mutated(ORIGINALS, PIECES),
    st.binary(max_size=200),
    st.text("{}[]:,-&*!|>'\"%@`#?<= \n\tab1.$\\", max_size=60).map(str.encode),
    st.dictionaries(_KEYS, _TREES, max_size=5).map(lambda values: json.dumps(values).encode()),
    st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join),
)
"""What is in a recipe file."""


def bomb(first: str, step: str, repeat: str, times: int, steps: int) -> bytes:
    """Lines that each hold the one before several times.

    Args:
        first: line 0.
        step: line i, from `{i}` and from `{before}`: `repeat`, of `{j}` = i - 1, so many times.
    """
    lines = [first]
    for i in range(1, steps):
        before = ", ".join([repeat.format(j=i - 1, n=n) for n in range(times)])
        lines.append(step.format(i=i, before=before))
    return "\n".join(lines).encode()


BOMBS = {
    "aliases": bomb("a0: &a0 [x]", "a{i}: &a{i} [{before}]", "*a{j}", 10, 10),
    "text": bomb("a0: x", "a{i}: '{before}'", "${{a{j}}}", 10, 10),
    "copies": bomb("a0: x", "a{i}: {{{before}}}", "b{n}: '${{a{j}}}'", 2, 30),
    "depth": b"a: " + b"[" * 100_000,
    "values": b"a: [" + b"1," * 100_000 + b"]",
    "size": b"# " + b"x" * (2 << 20),
}
"""Small files that ask for more than any machine holds, and large ones."""

MERGES = bomb("a0: &a0 {x: 1}", "a{i}: &a{i} {{x{i}: 1, <<: [{before}]}}", "*a{j}", 10, 10)
"""A few keys, brought in a billion times."""
