"""A network and data of one's own, from a script: a small convolutional network on scikit-learn's handwritten digits.

python -m examples.script
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import sekron_search
from examples.common import accuracy, train
from sekron_search.data import digits


def network() -> nn.Module:
    """A network for images of shape (N, 1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def main(epochs: int = 15, **settings: Any) -> sekron_search.Result:
    """Train the network, halve its multiply-adds, and compare."""
    splits: list[TensorDataset] = [digits().train, digits().validation, digits().test]  # type: ignore[list-item]
    training, validation, test = splits
    model = train(network(), training, F.cross_entropy, epochs)
    images, labels = validation.tensors
    result = sekron_search.compress(
        model,
        images[:32],  # the batch that latency and memory are meant for
        budget={"flops": "0.5x", "params": "0.6x"},
        calibration=training.tensors[0],  # no labels
        evaluate=lambda net: accuracy(net, images, labels=labels),  # for choosing
        test=lambda net: accuracy(net, test.tensors[0], labels=test.tensors[1]),  # for the report, used nowhere else
        train=training,
        factory="examples.script:network",  # with it `load` needs no network
        **settings,
    )
    print(f"accuracy {result.report['original']['metric']:.3f} -> {result.report['compressed']['metric']:.3f}")
    print(f"report: {result.path / 'report.html'}")
    again = sekron_search.load(result.path)
    assert accuracy(again, images, labels=labels) == accuracy(result.model, images, labels=labels)
    return result


if __name__ == "__main__":
    main()
