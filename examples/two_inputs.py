"""A network of several inputs: the left and the right half of a digit, each seen by layers of its own.

python -m examples.two_inputs
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import StackDataset, TensorDataset

import sekron_search
from examples.common import accuracy, train
from sekron_search.data import digits


class Halves(nn.Module):
    """Takes two images of shape (N, 1, 8, 4), gives logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Flatten(), nn.Linear(32, 96), nn.ReLU()) for _ in range(2))
        self.both = nn.Sequential(nn.Linear(192, 96), nn.ReLU(), nn.Linear(96, 10))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Both halves are needed to tell most digits."""
        logits: Tensor = self.both(torch.cat([self.left(left), self.right(right)], 1))
        return logits


def halves(dataset: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Left halves, right halves and labels."""
    images, labels = dataset.tensors
    return images[..., :4].contiguous(), images[..., 4:].contiguous(), labels


def main(epochs: int = 20, **settings: Any) -> sekron_search.Result:
    """Train the network, and keep 0.4 of its parameters."""
    left, right, labels = halves(digits().train)
    # A sample is ((left, right), label); tensors will do as datasets.
    training = StackDataset(TensorDataset(left, right), labels)  # type: ignore[arg-type]
    model = train(Halves(), training, F.cross_entropy, epochs)
    *held_out, answers = halves(digits().validation)
    return sekron_search.compress(
        model,
        (left[:16], right[:16]),  # a tuple: the arguments
        budget={"params": "0.4x"},
        calibration=(left, right),  # likewise; or an iterable of ((left, right), target), like `training`
        evaluate=lambda net: accuracy(net, *held_out, labels=answers),
        train=training,
        **settings,
    )


if __name__ == "__main__":
    print(main().path / "report.html")
