"""What examples/own.yaml names: a network, its data, a metric and a loss. Run it to train the network.

python -m examples.own_network examples/own.pt
sekron-search run examples/own.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common import train
from sekron_search import DataBundle
from sekron_search.data import digits


def network(width: int = 48) -> nn.Module:
    """The architecture; arguments come from `model.kwargs`."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * width, 10)),
    )


def data(seed: int = 0) -> DataBundle:
    """Three disjoint datasets of (inputs, target)."""
    return digits(seed)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy against softened labels."""
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


@torch.no_grad()
def top2(model: nn.Module, dataset: Any) -> float:
    """Share of the samples whose class is among the two likeliest."""
    images, labels = dataset.tensors
    return float((model(images).topk(2).indices == labels[:, None]).any(1).float().mean())


def main(path: Path, epochs: int = 15) -> None:
    """Train, and save the weights."""
    torch.save(train(network(), data().train, loss, epochs).state_dict(), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
