"""The linear layers of a transformer: a small vision transformer on scikit-learn's handwritten digits.

python -m examples.transformer
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sekron_search
from examples.common import accuracy, train
from sekron_search.data import digits

WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """Attention and a feed-forward layer. Written with nn.Linear: what nn.MultiheadAttention packs is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, WIDTH) to tokens."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        tokens: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return tokens


class VisionTransformer(nn.Module):
    """Images (N, 1, 8, 8) in sixteen patches, to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Conv2d(1, WIDTH, 2, 2), nn.Parameter(0.02 * torch.randn(1, 16, WIDTH))
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.blocks(tokens).mean(1))
        return logits


def main(epochs: int = 30, **settings: Any) -> sekron_search.Result:
    """Train the network, and keep 0.6 of its parameters."""
    training, validation = digits().train, digits().validation
    images, labels = validation.tensors  # type: ignore[attr-defined]
    model = train(VisionTransformer(), training, F.cross_entropy, epochs)
    space = {"families": ["channel_svd", "sekron"], "max_factors": 2, "exclude": ["embed", "head"]}
    return sekron_search.compress(
        model,
        images[:16],
        budget={"params": "0.6x"},
        calibration=training,
        evaluate=lambda net: accuracy(net, images, labels=labels),
        train=training,
        **{"space": space, **settings},
    )


if __name__ == "__main__":
    print(main().path / "report.html")
