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
    n=st.sampled_from([1, 100, 128, 4096]),
    m=st.sampled_from([1, 128, 2731]),
)
def test_what_is_taken_runs_and_nothing_faster_in_the_table_does(
    major: int, dtype: torch.dtype, head_dim: int, n: int, m: int
) -> None:
    sizes = major, dtype, head_dim, n, m
    taken = routes.fastest(*sizes)
    assert routes.runs(taken, *sizes)
    table = routes.orders(routes.load())
    order = table.get((major, routes.kind(dtype))) or table.get((None, routes.kind(dtype)), ["math"])
    assert not any(routes.runs(name, *sizes) for name in order[: order.index(taken)])


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
    assert routes.fastest(9, torch.bfloat16, 192, 64, 64) == "flash"
    assert routes.use_flash_attention_3(HOPPER) and routes.use_flash_attention_3(HOPPER)
    assert installed == ["FA3"]
    assert routes.fastest(9, torch.bfloat16, 64, 64, 64) == "fa3" and flash.CUDA["fa3"] is flash.FLASH
    assert routes.fastest(9, torch.float32, 64, 64, 64) == "efficient"
    assert routes.fastest(8, torch.bfloat16, 64, 64, 64) != "flash", "another card of the machine, which it refuses"


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


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fa3", "cudnn", "flash", "efficient", "math"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [True, False])
def test_each_kernel_gives_what_matrix_products_give(name: str, dtype: torch.dtype, causal: bool) -> None:
    """Values, denominators and gradients, for lengths of every kind, heads apart or on a diagonal."""
    major, tried = torch.cuda.get_device_capability()[0], 0
    for n, m in ((1, 1), (1, 70), (33, 33), (128, 128), (384, 256), (1024, 1024), (2731, 2731)):
        if not routes.runs(name, major, dtype, 64, n, m) or causal and n != m:
            continue
        tried += 1
        drawn = [torch.randn(2, length * 3 + 4, 4, 64, device="cuda", dtype=torch.float64) for length in (n, m, m, n)]
        for diagonal in (False, True):
            exact = [on_diagonal(x) if diagonal else x[:, ::3][:, :-2].transpose(1, 2) for x in drawn]
            q, k, v, grad = (
                on_diagonal(x.to(dtype)) if diagonal else x.to(dtype) for x in (drawn if diagonal else exact)
            )
            given_, expected = (
                (out, lse, *kernel.backward(grad_, *qkv, out, lse.contiguous(), causal, 0.125))
                for kernel, qkv, grad_ in ((flash.CUDA[name], (q, k, v), grad), (flash.MATH, exact[:3], exact[3]))
                for out, lse in [kernel.forward(*qkv, causal, 0.125)]
            )
            within = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
            for what, one, other in zip(("out", "lse", "dq", "dk", "dv"), given_, expected, strict=True):
                assert (one - other).abs().max() < within * (1 + other.abs().max()), (what, n, m, diagonal)
    if not tried:
        pytest.skip("does not run here for this dtype")


def on_diagonal(x: torch.Tensor) -> torch.Tensor:
    """(B, 3 n + 4, H, D) as (B, H, n, D): every third position, each head one further than the one before."""
    batch, tokens, heads, head_dim = x.shape
    steps = x.stride(0), x.stride(2) + x.stride(1), 3 * x.stride(1), 1
    return x.as_strided((batch, heads, (tokens - 4) // 3, head_dim), steps)
