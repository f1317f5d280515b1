"""A LongNet over the tiles of a slide: Prov-GigaPath's slide encoder (doi 10.1038/s41586-024-07441-w).

Tiles of a gigapixel image, each as a vector that a tile encoder made of it, become one vector for the slide. Nothing is
causal, and a tile's place on the slide is added to it as sines and cosines. How trained weights come in is in
`longnet_kit.model.slide_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from longnet_kit.errors import UserError
from longnet_kit.model.blocks import Block
from longnet_kit.model.dropout import Dropout

Pooling = Literal["cls", "mean"]

BASE = 10_000.0


class SlideEncoder(nn.Module):
    """Tiles in, one vector per slide out. The defaults are those of GigaPath's published encoder.

    Args:
        in_dim: width of a tile's features.
        dim: width of the residual stream, a multiple of 4 and of `heads`.
        layers, heads, ffn_dim: of the blocks.
        grid: how many tiles fit on a slide along either side.
        tile_size: side of a tile, in the unit of the coordinates.
        pooling: `cls`, the state of the class token, or `mean`, over the tiles.
        attention: `backend` and its own keys, as in a recipe; by default `attention(262144, tile_size)`.
        dropout: probability of dropping an element of the embedding and of each sublayer's output, in training.
        ffn_chunk: tokens that go through the feed-forward layers at a time; None: all.

    Raises:
        UserError: sizes or settings that do not go together, or an attention mapping that is wrong.
    """

    def __init__(
        self,
        in_dim: int = 1536,
        *,
        dim: int = 768,
        layers: int = 12,
        heads: int = 16,
        ffn_dim: int = 3072,
        grid: int = 1000,
        tile_size: int = 256,
        pooling: Pooling = "cls",
        attention: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        ffn_chunk: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "dim": dim, "layers": layers, "heads": heads, "ffn_dim": ffn_dim, "grid": grid}
        for name, size in {**sizes, "tile_size": tile_size, "ffn_chunk": ffn_chunk}.items():
            if size is not None and size < 1:
                raise UserError(f"{name} is {size}, expected at least 1")
        if dim % heads or dim % 4:
            raise UserError(f"dim is {dim} and heads is {heads}; dim must be a multiple of heads and of 4")
        if pooling not in get_args(Pooling):
            raise UserError(f"pooling is {pooling!r}, expected 'cls' or 'mean'")
        self.in_dim, self.grid, self.tile_size, self.pooling = in_dim, grid, tile_size, pooling
        options = slide_attention(tile_size=tile_size) if attention is None else attention
        self.embed = nn.Linear(in_dim, dim)
        self.cls_token = nn.Parameter(torch.empty(dim))
        self.dropout = Dropout(dropout)
        blocks = nn.ModuleList(Block(dim, heads, ffn_dim, dropout, False, options, ffn_chunk) for _ in range(layers))
        self.blocks = cast(Sequence[Block], blocks)
        self.encoder_norm = nn.LayerNorm(dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, those of the blocks after MAGNETO (table 2): gain sqrt(log 2M), M blocks."""
        nn.init.xavier_uniform_(self.embed.weight)
        nn.init.zeros_(self.embed.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        gain = math.sqrt(math.log(2 * len(self.blocks)))
        for block in self.blocks:
            block.reset_parameters(gain)
        self.encoder_norm.reset_parameters()
        self.norm.reset_parameters()

    def forward(self, features: Tensor, coordinates: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """The vector of each slide.

        Args:
            features: (B, N, in_dim), a tile each, of the weights' dtype. Their order decides which tiles share a
                segment; GigaPath keeps that of the tiling.
            coordinates: (B, N, 2), the corner of each tile on the slide, from 0 to below grid * tile_size.
            key_padding_mask: (B, N) bool, True where the tile is real; pad on the right. What stands in padding, NaN
                too, never changes the result.

        Returns:
            (B, dim).

        Raises:
            UserError: malformed arguments, a tile beyond the grid, or a slide without a tile.
        """
        *_, x = self._states(features, coordinates, key_padding_mask)
        return self._pooled(self.encoder_norm(x), key_padding_mask)

    def layer_vectors(self, features: Tensor, coordinates: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """What each layer would say of each slide, the embedding first; the arguments are those of `forward`.

        As in GigaPath the norm at the end of the encoder is left out, so the last is not what `forward` gives.

        Returns:
            (layers + 1, B, dim).
        """
        states = self._states(features, coordinates, key_padding_mask)
        return torch.stack([self._pooled(x, key_padding_mask) for x in states])

    def _states(self, features: Tensor, coordinates: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """The embedding and what comes out of each block: (B, 1 + N, dim), the class token first."""
        self._check(features, coordinates, mask)
        if mask is not None:
            features = features.masked_fill(~mask[..., None], 0)
            coordinates = coordinates.masked_fill(~mask[..., None], 0)
            mask = torch.cat((mask.new_ones(len(mask), 1), mask), dim=1)
        x = self.embed(features)
        side = side_embedding(self.grid, x.shape[-1]).to(x)
        first, second = self._cells(coordinates).unbind(-1)
        x = x + torch.cat((side[second], side[first]), dim=-1)
        x = self.dropout(torch.cat((self.cls_token.to(x.dtype).expand(len(x), 1, -1), x), dim=1))
        yield x
        for block in self.blocks:
            x = block(x, None, mask)
            yield x

    def _pooled(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, 1 + N, dim) to (B, dim)."""
        if self.pooling == "cls":
            return self.norm(x[:, 0])
        tiles = x[:, 1:]
        if mask is None:
            return self.norm(tiles.mean(dim=1))
        return self.norm(torch.where(mask[..., None], tiles, 0).sum(dim=1) / mask.sum(dim=1, keepdim=True))

    def _cells(self, coordinates: Tensor) -> Tensor:
        """The place of each tile on the grid, (B, N, 2) int64."""
        cells = (coordinates.double() / self.tile_size).floor()
        inside = (cells >= 0) & (cells < self.grid)  # false for NaN
        if not inside.all():
            outside = coordinates[~inside.all(dim=-1)][0].tolist()
            raise UserError(
                f"a tile stands at {tuple(outside)}, and coordinates are 0 to below {self.grid * self.tile_size:,} "
                f"({self.grid} tiles of {self.tile_size}); give tile corners in pixels at the level of the tiles, or "
                "build the encoder with a larger grid"
            )
        return cells.long()

    def _check(self, features: Tensor, coordinates: Tensor, mask: Tensor | None) -> None:
        if features.dim() != 3 or features.shape[1] < 1 or features.shape[2] != self.in_dim:
            raise UserError(
                f"features has shape {tuple(features.shape)}, expected (batch, at least one tile, {self.in_dim})"
            )
        if coordinates.shape != (*features.shape[:2], 2):
            raise UserError(
                f"coordinates has shape {tuple(coordinates.shape)}, expected {(*features.shape[:2], 2)}: two of a tile"
            )
        if mask is None:
            return
        if mask.dtype != torch.bool or mask.shape != features.shape[:2]:
            raise UserError(
                f"key_padding_mask is {mask.dtype} of shape {tuple(mask.shape)}, expected torch.bool of "
                f"{tuple(features.shape[:2])}, True where the tile is real"
            )
        if not mask.any(dim=1).all():
            raise UserError("key_padding_mask leaves a slide without a tile; take that slide out of the batch")


def slide_attention(slide_size: int = 262_144, tile_size: int = 256) -> dict[str, Any]:
    """GigaPath's dilated attention: rates 1 to 16, and five lengths from 1024 to all tiles of the largest slide.

    Args:
        slide_size: side of the largest slide, in pixels, of which `tile_size` are a tile's.

    Raises:
        UserError: such a slide has fewer than 1024 tiles.
    """
    tiles = (slide_size // tile_size) ** 2
    if tiles < 1024:
        raise UserError(
            f"slides of {slide_size} have at most {tiles} tiles of {tile_size}, and the shortest segment is of 1024; "
            "give attention with segment_lengths of your own"
        )
    longest = int(math.log2(tiles))
    lengths = [int(2 ** (10 + (longest - 10) * i / 4)) for i in range(5)]
    return {
        "backend": "dilated",
        "segment_lengths": lengths,
        "dilation_rates": [1, 2, 4, 8, 16],
        "head_offsets": "grouped",
    }


def side_embedding(grid: int, dim: int) -> Tensor:
    """Sines and cosines of each place along a side of the grid, half of what a tile is given.

    At place p: sin(p / 10000^(4i / dim)) for i below dim / 4, then the cosines. A tile is given that of its second
    coordinate, then that of its first (the 2D embedding of MAE, arXiv 2111.06377).

    Args:
        dim: a multiple of 4.

    Returns:
        (grid, dim / 2), float64.
    """
    rates = BASE ** -(torch.arange(dim // 4, dtype=torch.float64) * 4 / dim)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
