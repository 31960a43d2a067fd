"""Training of the networks that benchmarks compress, where none are at hand; gone on with where it was stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sekron_search.precision import autocast_dtype
from sekron_search.tensor_files import read_checkpoint, write_checkpoint, write_tensors

#: Gradients are scaled down to this norm; epochs over which the learning rate rises; epochs between two scores.
MOST_GRADIENT, WARM, SCORED = 1.0, 1, 10

Pair = tuple[Tensor, Tensor]


def train_from_scratch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Sequence[Pair]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    out: Path,
    score: Callable[[nn.Module], str],
) -> None:
    """Train with a cosine-shaped learning rate, in bfloat16 where the processor computes in it.

    Args:
        network: What is trained, on the CPU.
        optimizer: Over its parameters, with the highest learning rate.
        batches: Of an epoch from 0, pairs of inputs (N, C, H, W) and targets.
        loss: Of the network's output, in float32, and the targets.
        epochs: In all.
        out: Where the weights go, as safetensors; a checkpoint lies beside them while it works.
        score: What is said of the network every ten epochs.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    highest, dtype = optimizer.param_groups[0]["lr"], autocast_dtype("auto", torch.device("cpu"))
    checkpoint, done = out.with_suffix(".checkpoint.pt"), 0
    if checkpoint.exists():
        saved = read_checkpoint(checkpoint)
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = int(saved["epochs"])
    for epoch in range(done, epochs):
        start, summed = time.monotonic(), 0.0
        network.train()
        own = batches(epoch)
        for step, (x, y) in enumerate(own):
            for group in optimizer.param_groups:
                group["lr"] = highest * _share(epoch + step / len(own), epochs)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                output = network(x.contiguous(memory_format=torch.channels_last))
            value = loss(output.float(), y)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), MOST_GRADIENT)
            optimizer.step()
            summed += float(value.detach())
        network.eval()
        shown = f", {score(network)}" if epoch % SCORED == SCORED - 1 or epoch + 1 == epochs else ""
        seconds = time.monotonic() - start
        print(f"epoch {epoch + 1}/{epochs}: loss {summed / len(own):.4f}{shown}, {seconds:.0f} s", flush=True)
        state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
        write_checkpoint(checkpoint, state)
    write_tensors(out, {name: t.contiguous() for name, t in network.state_dict().items()})


def _share(epoch: float, epochs: int) -> float:
    """Of the highest learning rate: rising, then falling like a cosine."""
    return min((epoch + 0.05) / WARM, 0.5 * (1 + math.cos(math.pi * epoch / epochs)))
