"""Trains the network that the benchmark compresses, once; what it has reached is kept after every epoch.

python -m benchmarks.super_resolution.train --data DIR --out WEIGHTS
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.super_resolution.data import Images, luma_psnr, patches, read_images
from benchmarks.super_resolution.network import Edsr
from sekron_search.files import read_checkpoint, write_checkpoint, write_tensors

EPOCHS, BATCH, RATE, MOST_GRADIENT = 120, 16, 1e-3, 1.0


def train(archive: Path, out: Path, epochs: int = EPOCHS) -> None:
    """Train from scratch by absolute errors, with new patches every epoch; goes on where it was stopped.

    Args:
        archive: The images.
        out: Where the weights go, as safetensors; a checkpoint lies beside them while it works.
        epochs: Passes over 20 patches of every image.
    """
    images = read_images(archive)
    chosen = Images(images["set14"])
    torch.manual_seed(0)
    network = Edsr()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    checkpoint, done = out.with_suffix(".checkpoint.pt"), 0
    if checkpoint.exists():
        saved = read_checkpoint(checkpoint)
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = int(saved["epochs"])
    for epoch in range(done, epochs):
        start = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        small, large = patches(images["bsd100"], seed=epoch).tensors
        order = torch.randperm(len(small), generator=torch.Generator().manual_seed(epoch))
        network.train()
        for batch in order.split(BATCH):
            x, y = (t[batch].contiguous(memory_format=torch.channels_last) for t in (small, large))
            with torch.autocast("cpu", torch.bfloat16):
                output = network(x)
            loss = F.l1_loss(output.float(), y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), MOST_GRADIENT)
            optimizer.step()
        network.eval()
        shown = f", Set14 {luma_psnr(network, chosen):.3f} dB" if epoch % 10 == 9 or epoch + 1 == epochs else ""
        print(
            f"epoch {epoch + 1}/{epochs}: loss {float(loss.detach()):.4f}{shown}, {time.monotonic() - start:.0f} s",
            flush=True,
        )
        state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
        write_checkpoint(checkpoint, state)
    write_tensors(out, {name: t.contiguous() for name, t in network.state_dict().items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    train(args.data / "data/sr_hr.tar", args.out, args.epochs)


if __name__ == "__main__":
    main()
