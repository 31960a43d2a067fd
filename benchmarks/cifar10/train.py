"""Trains a network on CIFAR-10 (JPEG), once; what it has reached is kept after every epoch.

python -m benchmarks.cifar10.train --network vgg --data DIR --out WEIGHTS
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.cifar10.config import NETWORKS, archive_of
from benchmarks.cifar10.data import cifar10, crop_and_flip
from benchmarks.training import Pair, train_from_scratch
from sekron_search.data import evaluate
from sekron_search.references import import_reference

EPOCHS, BATCH, RATE, DECAY = 15, 128, 0.1, 5e-4


def train(network: str, data: Path, out: Path, epochs: int = EPOCHS) -> None:
    """Train from scratch on the training images that are not kept for validation.

    Args:
        network: One of `NETWORKS`.
        data: Folder with the images.
        out: Where the weights go.
        epochs: Passes over the images.
    """
    bundle = cifar10(str(archive_of(data).resolve()))
    assert isinstance(bundle.train, TensorDataset)
    images, labels = bundle.train.tensors
    torch.manual_seed(0)
    made: nn.Module = import_reference(NETWORKS[network], "--network")()
    optimizer = torch.optim.SGD(made.parameters(), RATE, momentum=0.9, weight_decay=DECAY, nesterov=True)

    def batches(epoch: int) -> list[Pair]:
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(images), generator=generator)
        shown = crop_and_flip(images, generator)
        return [(shown[part], labels[part]) for part in order.split(BATCH)[:-1]]

    def score(trained: nn.Module) -> str:
        value = evaluate(trained, bundle.validation, "accuracy", batch_size=500)
        return f"validation {100 * value:.2f} %"

    train_from_scratch(
        made,
        optimizer,
        batches,
        F.cross_entropy,
        epochs=epochs,
        out=out,
        score=score,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=[n for n in NETWORKS if n != "resnet20"], required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    train(args.network, args.data, args.out, args.epochs)


if __name__ == "__main__":
    main()
