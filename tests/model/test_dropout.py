"""The mask of dropout: its share, its scale, and that it belongs to the tokens however they are spread."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longnet_kit.attention.sharding import bind
from longnet_kit.model.dropout import Dropout, keep_mask
from longnet_kit.parallel import threads
from longnet_kit.parallel.threads import ThreadShard

CPU = torch.device("cpu")


def mask(shape: tuple[int, int, int], p: float = 0.3, seed: int = 1, row: int = 0, position: int = 0) -> Tensor:
    return keep_mask(torch.Size(shape), p, seed, row, position, CPU)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_each_element_goes_with_probability_p(p: float) -> None:
    """Overall, and for every row, position and feature: within five standard deviations."""
    kept = mask((64, 128, 96), p).double()
    for dims in [(0, 1, 2), (1, 2), (0, 2), (0, 1)]:
        share = kept.mean(dims)
        count = kept.numel() / share.numel()
        assert (share - (1 - p)).abs().max() < 5 * (p * (1 - p) / count) ** 0.5


@pytest.mark.parametrize("step", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 64, 0), (0, 1, 1), (3, 5, 7)])
def test_neighbours_are_independent(step: tuple[int, int, int]) -> None:
    signs = mask((32, 128, 64), 0.5).double() * 2 - 1
    moved = signs
    for dim, by in enumerate(step):
        moved = moved.roll(by, dim)
    assert (signs * moved).mean().abs() < 5 / signs.numel() ** 0.5


def test_calls_are_independent() -> None:
    one, other = (mask((32, 128, 64), 0.5, seed).double() * 2 - 1 for seed in (1, 2))
    assert (one * other).mean().abs() < 5 / one.numel() ** 0.5


def test_a_part_has_the_mask_of_its_place() -> None:
    whole = mask((6, 40, 5))
    assert torch.equal(mask((2, 10, 5), row=4, position=30), whole[4:, 30:])


def test_positions_far_out_work() -> None:
    kept = mask((1, 4096, 16), 0.5, position=3 * 2**30)
    assert abs(kept.double().mean() - 0.5) < 0.02
    assert not torch.equal(kept, mask((1, 4096, 16), 0.5))


def test_what_stays_is_scaled_and_gradients_follow() -> None:
    drop = Dropout(0.25)
    x = torch.randn(4, 50, 8, dtype=torch.float64, requires_grad=True)
    out = drop(x)
    kept = out != 0
    assert 0.6 < kept.double().mean() < 0.9
    torch.testing.assert_close(out, torch.where(kept, x / 0.75, 0))
    out.sum().backward()
    torch.testing.assert_close(x.grad, kept.double() / 0.75)
    assert drop.eval()(x) is x and Dropout(0.0)(x) is x
    assert Dropout(1.0)(x).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype: torch.dtype) -> None:
    assert Dropout(0.5)(torch.ones(1, 4, 4, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_a_probability_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        Dropout(p)


def test_shards_draw_the_mask_of_the_whole() -> None:
    x = torch.ones(2, 24, 8)
    torch.manual_seed(3)
    whole = Dropout(0.4)(x)

    class Seeded(Dropout):
        """Threads share torch's generator, processes do not: here each rank draws the number that the first would."""

        def forward(self, x: Tensor) -> Tensor:
            seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(3)))
            return x * keep_mask(x.shape, self.p, seed, *self._first(x), x.device) / (1 - self.p)

    def work(shard: ThreadShard) -> Tensor:
        drop = Seeded(0.4)
        bind(drop, shard)
        return drop(x.chunk(4, 1)[shard.rank])

    torch.testing.assert_close(torch.cat(threads.run(4, work), 1), whole)
