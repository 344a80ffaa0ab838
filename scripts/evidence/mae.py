"""A masked autoencoder of pictures in plain torch: a ViT that sees a quarter of the patches, and a light decoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evidence.attention import Attention

EPS = 1e-6  # of a patch's variance


@dataclass(frozen=True)
class Shape:
    """The sizes of a masked autoencoder. The defaults are ViT-tiny, on pictures of 64 × 64 in patches of 4 × 4."""

    size: int = 64
    patch: int = 4
    width: int = 192
    layers: int = 12
    heads: int = 3
    decoder_width: int = 96
    decoder_layers: int = 2
    hidden: int = 4  # times the width
    masked: float = 0.75

    @property
    def patches(self) -> int:
        return (self.size // self.patch) ** 2

    @property
    def visible(self) -> int:
        return self.patches - round(self.masked * self.patches)

    def facts(self) -> dict[str, Any]:
        return asdict(self)


class Block(nn.Module):
    """Attention and a perceptron, each with its norm in front, as in ViT."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class MaskedAutoencoder(nn.Module):
    """Reconstructs the patches of a picture that are masked from those that are not.

    `forward` takes pictures, float (n, 3, size, size), and for each an order of its patches, int64 (n, patches). The
    first `shape.visible` of the order are seen. It returns the mean squared error of the others, whose pixels are
    normalised within each patch. There is no class token, and the places are sines and cosines that are not trained.
    """

    seen_places: Tensor
    places: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        pixels, width, narrow = 3 * shape.patch**2, shape.width, shape.decoder_width
        self.embed = nn.Linear(pixels, width)
        self.encoder = nn.ModuleList(Block(width, shape.hidden * width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(width)
        self.narrow = nn.Linear(width, narrow)
        self.mask_token = nn.Parameter(0.02 * torch.randn(narrow))
        self.decoder = nn.ModuleList(
            Block(narrow, shape.hidden * narrow, shape.heads) for _ in range(shape.decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(narrow)
        self.head = nn.Linear(narrow, pixels)
        self.register_buffer("seen_places", sines(shape, width), persistent=False)
        self.register_buffer("places", sines(shape, narrow), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, pictures: Tensor, order: Tensor) -> Tensor:
        patches = patches_of(pictures, self.shape.patch)
        seen, unseen = order[:, : self.shape.visible], order[:, self.shape.visible :]
        x = self.embed(taken(patches, seen)) + self.seen_places[seen]
        for block in self.encoder:
            x = block(x)
        x = self.narrow(self.norm(x))
        masks = self.mask_token.to(x.dtype).expand(len(x), unseen.shape[1], -1)
        x = torch.cat((x, masks), 1) + self.places[order]
        for block in self.decoder:
            x = block(x)
        guess = self.head(self.decoder_norm(x[:, seen.shape[1] :])).float()
        wanted = normalised(taken(patches, unseen))
        return (guess - wanted).square().mean()


def patches_of(pictures: Tensor, patch: int) -> Tensor:
    """The patches of pictures row by row, (n, patches, 3 · patch²)."""
    cut = pictures.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # n, 3, rows, patch, columns, patch
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def taken(patches: Tensor, chosen: Tensor) -> Tensor:
    """The chosen patches of each picture."""
    return patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[-1]))


def normalised(patches: Tensor) -> Tensor:
    """Patches whose pixels have a mean of 0 and a variance of 1. One of a single colour is 0."""
    centred = patches - patches.mean(-1, keepdim=True)
    return centred / (patches.var(-1, keepdim=True) + EPS).sqrt()


def sines(shape: Shape, width: int) -> Tensor:
    """The places of the patches as sines and cosines of their row and column, (patches, width)."""
    if width % 4:
        raise ValueError(f"the width is {width}, and places take a multiple of 4")
    side = shape.size // shape.patch
    rates = 10000.0 ** -torch.arange(0, 1, 4 / width, dtype=torch.float64)[: width // 4]
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    along = torch.cat((angles.sin(), angles.cos()), 1)  # (side, width / 2)
    rows, columns = along.repeat_interleave(side, 0), along.repeat(side, 1)
    return torch.cat((rows, columns), 1).float()
