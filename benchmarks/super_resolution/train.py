"""Trains the network that the benchmark compresses, once; what it has reached is kept after every epoch.

python -m benchmarks.super_resolution.train --data DIR --out WEIGHTS
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.super_resolution.config import archive_of
from benchmarks.super_resolution.data import Images, luma_psnr, patches, read_images
from benchmarks.super_resolution.network import Edsr
from benchmarks.training import Pair, train_from_scratch

EPOCHS, BATCH, RATE = 60, 16, 1e-3


def train(data: Path, out: Path, epochs: int = EPOCHS) -> None:
    """Train from scratch by absolute errors, with new patches every epoch.

    Args:
        data: Folder with the images.
        out: Where the weights go.
        epochs: Passes over 20 patches of every image.
    """
    images = read_images(archive_of(data))
    chosen = Images(images["set14"])
    torch.manual_seed(0)
    network = Edsr()

    def batches(epoch: int) -> list[Pair]:
        small, large = patches(images["bsd100"], seed=epoch).tensors
        order = torch.randperm(len(small), generator=torch.Generator().manual_seed(epoch))
        return [(small[part], large[part]) for part in order.split(BATCH)]

    train_from_scratch(
        network,
        torch.optim.Adam(network.parameters(), RATE),
        batches,
        F.l1_loss,
        epochs=epochs,
        out=out,
        score=lambda trained: f"Set14 {luma_psnr(trained, chosen):.3f} dB",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    train(args.data, args.out, args.epochs)


if __name__ == "__main__":
    main()
