"""The table of CUDA kernels: that it is whole, who is taken from it, and FlashAttention-3 where it is installed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit.attention import flash, routes

HOPPER = torch.device("cuda", 0)


def test_the_table_names_kernels_that_exist_and_ends_with_the_one_that_takes_everything() -> None:
    orders = routes.orders(routes.load())
    assert {(None, "half"), (None, "float32")} <= set(orders)
    for order in orders.values():
        assert order[-1] == "math" and len(set(order)) == len(order)
        assert set(order) <= set(flash.CUDA)


@given(
    major=st.integers(5, 13),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    head_dim=st.integers(1, 300),
)
def test_what_is_taken_runs_and_nothing_faster_in_the_table_does(major: int, dtype: torch.dtype, head_dim: int) -> None:
    taken = routes.fastest(major, dtype, head_dim)
    assert routes.runs(taken, major, dtype, head_dim)
    table = routes.orders(routes.load())
    order = table.get((major, routes.kind(dtype))) or table.get((None, routes.kind(dtype)), ["math"])
    assert not any(routes.runs(name, major, dtype, head_dim) for name in order[: order.index(taken)])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A FlashAttention-3 that is installed, and what was done with it."""
    done: list[str] = []
    module = ModuleType("flash_attn_interface")
    module.__spec__ = type(sys.__spec__)("flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    active: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: active[0] if active else None)

    def activate(name: str) -> None:
        done.append(name)
        active[:] = [name]

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return done


def test_flash_attention_3_is_taken_on_a_hopper_and_once(installed: list[str]) -> None:
    assert routes.fastest(9, torch.bfloat16, 192) == "flash"
    assert routes.use_flash_attention_3(HOPPER) and routes.use_flash_attention_3(HOPPER)
    assert installed == ["FA3"]
    assert routes.fastest(9, torch.bfloat16, 64) == "fa3" and flash.CUDA["fa3"] is flash.FLASH
    assert routes.fastest(9, torch.float32, 64) == "efficient"
    assert routes.fastest(8, torch.bfloat16, 64) != "flash", "another card of the machine, which it refuses"


@pytest.mark.parametrize("missing", ["module", "torch", "hopper", "gpu"])
def test_flash_attention_3_is_left_where_it_cannot_be(
    installed: list[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    device = HOPPER
    if missing == "module":
        monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
        monkeypatch.setattr(routes.importlib.util, "find_spec", lambda _: None)
    elif missing == "torch":
        monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    elif missing == "hopper":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    else:
        device = torch.device("cpu")
    assert not routes.use_flash_attention_3(device)
    assert not installed


def test_a_flash_attention_3_that_does_not_load_is_told_of_and_left(
    installed: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> Any:
        raise RuntimeError("undefined symbol")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", fail)
    assert not routes.use_flash_attention_3(HOPPER)
    assert "undefined symbol" in caplog.text
