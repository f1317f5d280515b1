"""A LongNet over the patches of an image: LongViT (arXiv 2312.03558), for images of up to 32,768 pixels a side.

Every patch is a token, row by row; nothing is causal, and there is no class token. Where a patch stands is told by a
table that is learned. `LongViT` gives the states of the patches, `ImageEncoder` and `ImageClassifier` make one vector
of them, each in the way that its weights were trained. How those come in is in `longnet_kit.model.image_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longnet_kit.errors import UserError
from longnet_kit.model.blocks import Block
from longnet_kit.model.dropout import Dropout

CHANNELS = 3
_GUARD = 0.1
"""What the weights were trained with on top of the number of patches, so that rounding never loses one (from DINO)."""
_LENGTHS = {
    4096: [1024, 2048, 4096, 8192, 16384],
    8192: [1024, 4096, 8192, 16384, 65536],
    16384: [1024, 4096, 16384, 65536, 262144],
    32768: [1024, 4096, 32768, 262144, 1048576],
}


class LongViT(nn.Module):
    """Images in, the state of each patch out. The defaults are those of the published small network.

    Args:
        image_size: side, in pixels, of the square images whose patches have a learned position each; those of images
            of other sides are interpolated.
        patch_size: side of a patch in pixels; `image_size` is a multiple of it.
        dim: width of the residual stream, a multiple of `heads`.
        layers, heads, ffn_dim: of the blocks.
        attention: `backend` and its own keys, as in a recipe; by default `image_attention(image_size)`.
        dropout: probability of dropping an element of the embedding and of each sublayer's output, in training.
        ffn_chunk: patches that go through the feed-forward layers at a time; None: all.

    Raises:
        UserError: sizes that do not go together, or an attention mapping that is wrong.
    """

    def __init__(
        self,
        image_size: int = 1024,
        *,
        patch_size: int = 32,
        dim: int = 384,
        layers: int = 12,
        heads: int = 16,
        ffn_dim: int = 1536,
        attention: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        ffn_chunk: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"image_size": image_size, "patch_size": patch_size, "dim": dim, "layers": layers, "heads": heads}
        for name, size in {**sizes, "ffn_dim": ffn_dim, "ffn_chunk": ffn_chunk}.items():
            if size is not None and size < 1:
                raise UserError(f"{name} is {size}, expected at least 1")
        if image_size % patch_size:
            raise UserError(
                f"image_size is {image_size} and patch_size is {patch_size}; image_size must be a multiple of "
                f"patch_size, as {_nearest(image_size, patch_size)} is"
            )
        if dim % heads:
            raise UserError(f"dim is {dim} and heads is {heads}; dim must be a multiple of heads")
        self.dim, self.patch_size = dim, patch_size
        options = image_attention(image_size) if attention is None else attention
        self.embed = nn.Conv2d(CHANNELS, dim, patch_size, stride=patch_size)
        side = image_size // patch_size
        self.places = nn.Parameter(torch.empty(side, side, dim))
        self.dropout = Dropout(dropout)
        blocks = nn.ModuleList(Block(dim, heads, ffn_dim, dropout, False, options, ffn_chunk) for _ in range(layers))
        self.blocks = cast(Sequence[Block], blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, those of the blocks after MAGNETO (table 2): gain sqrt(log 2M), M blocks."""
        self.embed.reset_parameters()
        nn.init.trunc_normal_(self.places, std=0.02)
        gain = math.sqrt(math.log(2 * len(self.blocks)))
        for block in self.blocks:
            block.reset_parameters(gain)

    def forward(self, images: Tensor) -> Tensor:
        """The state of each patch, row by row; no norm stands behind the last block.

        Args:
            images: (B, 3, height, width), floating point, both sides multiples of the patch's.

        Returns:
            (B, N, dim), N = height / patch_size * width / patch_size.

        Raises:
            UserError: images of another kind or size.
        """
        self._check(images)
        x = self.embed(images)  # (B, dim, rows, columns)
        places = self._places(*x.shape[2:])
        x = x.flatten(2).transpose(1, 2).contiguous()  # once, or each layer norm would copy
        x = self.dropout(x + places)
        for block in self.blocks:
            x = block(x, None, None)
        return x

    def _places(self, rows: int, columns: int) -> Tensor:
        """The positions of an image's patches, (rows * columns, dim)."""
        side = len(self.places)
        if (rows, columns) == (side, side):
            return self.places.flatten(0, 1)
        scale = ((rows + _GUARD) / side, (columns + _GUARD) / side)
        found = F.interpolate(self.places.permute(2, 0, 1)[None], scale_factor=scale, mode="bicubic")
        return found[0].flatten(1).T

    def _check(self, images: Tensor) -> None:
        if images.dim() != 4 or images.shape[1] != CHANNELS or not images.is_floating_point():
            raise UserError(
                f"images is {images.dtype} of shape {tuple(images.shape)}, expected floating point of "
                f"(batch, {CHANNELS}, height, width)"
            )
        height, width = images.shape[2:]
        fitting = _nearest(height, self.patch_size), _nearest(width, self.patch_size)
        if (height, width) != fitting:
            raise UserError(
                f"images are {height} x {width} (height x width) and patches {self.patch_size} x {self.patch_size}; "
                f"resize, crop or pad the images to {fitting[0]} x {fitting[1]}"
            )


class ImageEncoder(nn.Module):
    """Images in, one vector each out, as LongViT was pre-trained: the mean of the normed states of the patches.

    Args:
        backbone: what gives the states.
    """

    def __init__(self, backbone: LongViT) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = nn.LayerNorm(backbone.dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) to (B, dim); see `LongViT.forward`."""
        return self.norm(self.backbone(images)).mean(dim=1)


class ImageClassifier(nn.Module):
    """Images in, logits out, as LongViT is fine-tuned: a linear head on the norm of the mean state of the patches.

    Args:
        backbone: what gives the states.
        classes: how many logits there are.

    Raises:
        UserError: there are no classes.
    """

    def __init__(self, backbone: LongViT, classes: int) -> None:
        super().__init__()
        if classes < 1:
            raise UserError(f"classes is {classes}, expected at least 1")
        self.backbone = backbone
        self.norm = nn.LayerNorm(backbone.dim)
        self.head = nn.Linear(backbone.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) to (B, classes); see `LongViT.forward`."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """What the head is given of each image: (B, 3, height, width) to (B, dim)."""
        return self.norm(self.backbone(images).mean(dim=1))


def image_attention(image_size: int = 1024) -> dict[str, Any]:
    """LongViT's dilated attention: rates 1 to 16, and five lengths in patches of 32.

    Args:
        image_size: side of the images in pixels. Sides of 4096, 8192, 16384 and 32768 have published lengths of their
            own; all others have those of 1024.
    """
    return {
        "backend": "dilated",
        "segment_lengths": list(_LENGTHS.get(image_size, [64, 128, 256, 512, 1024])),
        "dilation_rates": [1, 2, 4, 8, 16],
        "head_offsets": "grouped",
    }


def _nearest(size: int, patch_size: int) -> int:
    """The multiple of the patch's side that is nearest to a size, at least one patch."""
    return max(1, round(size / patch_size)) * patch_size
