"""The benchmarks run, write what they say they write, and hold dilated attention to a peer that is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longnet_kit import attention
from longnet_kit.attention import routes

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("seq_len", "heads", "branches"),
    [
        (64, 4, [(16, 1), (32, 2), (64, 4)]),
        (64, 6, [(16, 1), (32, 4), (64, 8)]),
        (48, 3, [(16, 1), (48, 16)]),
    ],
)
def test_the_peer_is_dilated_attention(causal: bool, seq_len: int, heads: int, branches: list) -> None:
    import peer

    lengths, rates = zip(*branches, strict=True)
    backend = attention.build({"backend": "dilated", "segment_lengths": lengths, "dilation_rates": rates})
    qkv = [torch.randn(2, seq_len, heads, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours, theirs = backend(*qkv, causal=causal), peer.attend(*qkv, branches, causal=causal)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-12)
    upstream = torch.randn_like(ours)
    (expected,), (found,) = (torch.autograd.grad(out, qkv[2:], upstream, retain_graph=True) for out in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # of v: the mixing weights carry none to q and k


@pytest.mark.parametrize(
    ("name", "arguments", "keys"),
    [
        ("attention", ["--only", "backends", "--lengths", "64", "128", "--heads", "2"], {"backends"}),
        ("scaling", ["--longest", "16384", "--total", "16384", "--heads", "1"], {"doubling", "figure"}),
        (
            "step",
            ["--steps", "8", "quickstart", "data.seq_len=64", "data.eval_contexts=[]", "trainer.limit_val_batches=0"],
            {"loops", "parts", "own", "trainers", "recipe"},
        ),
        ("parallel", ["--tokens", "4096", "--ranks", "1", "2"], {"timed", "counted"}),
        ("routes", ["--length", "128", "--heads", "2", "--write"], {"kernels"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.soak
def test_a_benchmark_prints_a_table_and_writes_json_and_a_plot(
    name: str, arguments: list[str], keys: set[str], tmp_path: Path
) -> None:
    files = ["--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "found.png")]
    before = routes.TABLE.read_text()
    command = [sys.executable, str(ROOT / "tools" / f"bench_{name}.py"), "--rounds", "1"]
    arguments = arguments if name == "parallel" else [*arguments, "--device", "cpu"]
    ended = subprocess.run([*command, *files, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"machine", *keys}
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert found["machine"][-10:-6] >= "2026" and len(ended.stdout.splitlines()) > 3
    assert routes.TABLE.read_text() == before, "a CPU has no say in it"


def test_measured_orders_are_taken_over_and_others_keep_their_place() -> None:
    import bench_routes

    rows = [
        {"dtype": "half", "kernel": kernel, "both TFLOP/s": rate}
        for kernel, rate in (("math", 10.0), ("cudnn", 300.0), ("flash", 400.0))
    ]
    made = bench_routes.with_orders(routes.load(), 9, rows, "a GPU")
    orders = routes.orders(made)
    assert orders[9, "half"] == ["fa3", "flash", "cudnn", "efficient", "math"], "fa3 is not installed everywhere"
    others = {key: order for key, order in routes.orders(routes.load()).items() if key != (9, "half")}
    assert {key: orders[key] for key in others} == others
    new = routes.orders(bench_routes.with_orders(routes.load(), 8, rows, "a GPU"))
    assert new[8, "half"] == ["flash", "cudnn", "efficient", "math"] and new[9, "half"][0] == "fa3"


def test_the_peak_of_memory_is_that_of_what_was_allocated() -> None:
    import measure

    cpu = torch.device("cpu")
    kept = [torch.ones(2**22) for _ in range(4)]  # 16 MB each, from the heap
    del kept
    for size in (2**22, 2**25):
        found = measure.peak(lambda size=size: torch.ones(size) + 1, cpu)
        assert 8 * size <= found + 2**20 and found <= 8 * size + 2**25
