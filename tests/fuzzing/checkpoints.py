"""Checkpoints of all kinds: nearly right ones, whole ones with the wrong content, and some that bring code along."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import shutil
import subprocess
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzzing.mutations import mutated

CANARY = "canary"
"""A file in the working directory that is there once code was run."""


class Small(nn.Module):
    """A network of a few weights."""

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.register_buffer("counts", torch.arange(4))


def state() -> dict[str, Any]:
    """Tensors for the network, named as in a checkpoint."""
    return {f"model.{name}": x for name, x in Small().state_dict().items()}


def checkpoint(state_dict: Any) -> dict[str, Any]:
    """The parts that a resumed training asks for."""
    return {"state_dict": state_dict, "global_step": 3, "optimizer_states": [], "lr_schedulers": [], "loops": {}}


def saved(content: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


GOOD = saved(checkpoint(state()))
_OLD = saved(checkpoint(state()), _use_new_zipfile_serialization=False)
_EXPORTED = safetensors.torch.save(Small().state_dict())
_PIECES = [
    b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\x80\x02", b"}q\x00", b".", b"ctorch\nTensor\n", b"cos\nsystem\n",
    b"\x8a\xff", b"\xff" * 8, b"\0" * 8, b"(", b"t", b"R", b"Q", b"q\x00", b"h\x00", b"\x85", b"\x93", b"]", b"e", b"b",
    b"X\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n",
    b"c__builtin__\nbytearray\n", b"FloatStorage", b"DoubleStorage", b"BoolStorage", b"\x00\x40", b'"F32"', b'"shape"',
    b"[2,3]", b"9" * 19,
]  # fmt: skip
"""What zip files, pickles and safetensors are made of."""


def entries(archive: bytes) -> dict[str, bytes]:
    """What a zip file holds."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def zipped(parts: Iterable[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file with the right checksums, whatever is in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that stand twice
        for name, content in parts:
            archive.writestr(name, content)
    return file.getvalue()


@st.composite
def _rezipped(draw: st.DrawFn) -> bytes:
    """The good checkpoint with some of its parts damaged, dropped, renamed, doubled or exchanged."""
    parts = list(entries(GOOD).items())
    for _ in range(draw(st.integers(1, 3))):
        i, j = (draw(st.integers(0, len(parts) - 1)) for _ in range(2))
        name, content = parts[i]
        change = draw(st.sampled_from(["damage", "damage", "drop", "rename", "double", "exchange"]))
        if change == "damage":
            parts[i] = name, draw(mutated([content], _PIECES))
        elif change == "drop" and len(parts) > 1:
            del parts[i]
        elif change == "rename":
            parts[i] = draw(st.sampled_from([parts[j][0], "x", "archive/data.pkl", "../x", "archive/"])), content
        elif change == "double":
            parts.append((name, draw(st.sampled_from([content, b"", content * 2]))))
        elif change == "exchange":
            parts[i], parts[j] = (name, parts[j][1]), (parts[j][0], content)
    return zipped(parts, draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])))


DAMAGED = st.one_of(
    mutated([GOOD, GOOD, _OLD, _EXPORTED], _PIECES), st.binary(max_size=300), _rezipped(), _rezipped(), _rezipped()
)
"""Nearly right files."""


def _tensors() -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some kinds are still in the making
        zeros = torch.zeros(2, 3)
        return [
            zeros, zeros.bool(), zeros.to(torch.complex64), zeros.to(torch.float8_e4m3fn), zeros.to(torch.uint16),
            zeros.T, zeros.to_sparse(), zeros.to_sparse_csr(), zeros.to("meta"), nn.Parameter(zeros), torch.zeros(()),
            torch.zeros(0), torch.full((2, 3), torch.nan), torch.zeros(1).expand(2, 3), torch.zeros(4),
            torch.zeros(1).expand(10**6, 10**6), torch.zeros(4, dtype=torch.int64), torch.zeros(4).to_sparse(),
            torch.zeros(4, dtype=torch.complex64), torch.zeros(3).as_strided((2,), (1,), 1),
            torch.quantize_per_tensor(zeros, 1.0, 0, torch.qint8), torch.nested.nested_tensor([zeros[0], zeros[0]]),
            torch.nested.nested_tensor([zeros[0], zeros[0, :2]]),
        ]  # fmt: skip


_NAMES = st.one_of(st.sampled_from([*state(), "model.", "model", "state_dict", "x"]), st.integers(0, 3), st.none())
_LEAVES = st.one_of(
    st.sampled_from(_tensors()), st.none(), st.integers(-1, 9), st.floats(), st.text(max_size=3), st.binary(max_size=3)
)
_TREES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_NAMES, inner, max_size=4)),
    max_leaves=8,
)
_STATES = st.one_of(
    _TREES,
    st.dictionaries(_NAMES, _LEAVES, max_size=6),
    st.dictionaries(_NAMES, _LEAVES, max_size=2).map(lambda some: {**state(), **some}),
    st.sampled_from([OrderedDict(state()), list(state().items()), Small().inner.weight, set()]),
)
CONTENTS = st.one_of(
    _TREES,
    _STATES.map(checkpoint),
    st.builds(lambda key, value: {**checkpoint(state()), key: value}, st.sampled_from([*checkpoint({})]), _TREES),
)
"""What a file of torch's may hold in place of a checkpoint."""


class _Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


_CODE = f"open({CANARY!r}, 'w').close()"
_TOUCH = ["touch", CANARY]
CALL = _Call(os.system, " ".join(_TOUCH))
"""Makes the canary where it is unpickled."""
_CALLS = [
    CALL, _Call(exec, _CODE), _Call(eval, _CODE), _Call(compile, _CODE, "", "exec"), _Call(builtins.open, CANARY, "w"),
    _Call(os.mkdir, CANARY), _Call(os.popen, " ".join(_TOUCH)), _Call(subprocess.call, _TOUCH),
    _Call(subprocess.Popen, _TOUCH), _Call(shutil.copy, "r.yaml", CANARY), _Call(Path.touch, Path(CANARY)),
    _Call(pickle.loads, pickle.dumps(CALL)), _Call(torch.load, CANARY), _Call(torch.hub.load, ".", CANARY),
    _Call(torch.jit.load, CANARY), _Call(torch.save, [], CANARY), _Call(__import__, "this"), _Call(bytearray, 10),
]  # fmt: skip


@st.composite
def _calling(draw: st.DrawFn) -> bytes:
    call = draw(st.sampled_from(_CALLS))
    places = [call, [call], checkpoint(call), checkpoint({"model.x": call}), {**checkpoint(state()), "loops": call}]
    content = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["zip", "old", "bare", "part"]))
    if kind == "bare":
        return pickle.dumps(content, protocol=draw(st.integers(0, 5)))
    if kind == "part":
        return zipped({**entries(GOOD), "archive/data.pkl": pickle.dumps(content, protocol=2)}.items())
    return saved(content, _use_new_zipfile_serialization=kind == "zip")


CALLING = _calling()
"""A file of torch's, or a bare pickle, somewhere in which a function is to be called."""
