"""The demonstration: a small residual network trained on the spot on scikit-learn's digits, then compressed."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.config import Config
from sekron_search.data import DataBundle, batches, digits, sample_order
from sekron_search.errors import ConfigError
from sekron_search.progress import Reporter
from sekron_search.tensor_files import write_tensors

EPOCHS = 25
BATCH = 64


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network for images of shape (N, 1, 8, 8) and ten classes.

    Args:
        width: Channels of the first block; the second has twice as many.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.block1 = _Block(width, width, 1)
        self.block2 = _Block(width, 2 * width, 2)
        self.block3 = _Block(2 * width, 2 * width, 1)
        self.linear = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (N, 10)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.block3(self.block2(self.block1(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def network(width: int = 64) -> nn.Module:
    """The demonstration's architecture, untrained; the factory that its configuration names."""
    return DigitsNet(width)


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move every image by up to one pixel in each direction, filling with its background."""
    count, _, height, width = images.shape
    background = float(images.min())
    padded = F.pad(images, (1, 1, 1, 1), value=background)
    top, left = (torch.randint(0, 3, (count,), generator=generator) for _ in range(2))
    rows, columns = top[:, None] + torch.arange(height), left[:, None] + torch.arange(width)
    samples = torch.arange(count)[:, None, None]
    return padded[:, 0][samples, rows[:, :, None], columns[:, None, :]][:, None].contiguous()


def demo_data(seed: int = 0) -> DataBundle:
    """The digits, with small shifts in training."""
    bundle = digits(seed)
    return DataBundle(bundle.train, bundle.validation, bundle.test, augment=shift)


def train_original(path: Path, seed: int, reporter: Reporter) -> None:
    """Train the network on the digits' training split and save its weights, unless they are there."""
    if path.exists():
        return
    torch.manual_seed(seed)
    model, data = network(), demo_data(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    count = len(data.train)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=EPOCHS * -(-count // BATCH))
    generator = torch.Generator().manual_seed(seed)
    with reporter.task("training the original", EPOCHS) as task:
        for epoch in range(EPOCHS):
            model.train()
            for (x,), y in batches(data.train, BATCH, order=sample_order(count, seed * 1000 + epoch)):
                loss = F.cross_entropy(model(shift(x, generator)), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            task.update(epoch + 1, f"loss {float(loss.detach()):.3f}")
    write_tensors(path, dict(model.state_dict()))


def demo_config(weights: Path, out: Path, seed: int) -> Config:
    """The demonstration as a configuration: three budgets together, batches of 64."""
    if not out.parent.is_dir():
        raise ConfigError(f"demo: the folder {out.parent} for the run does not exist; create it, or give --out")
    return Config.model_validate(
        {
            "model": {"factory": "sekron_search.demo:network", "weights": weights},
            "data": {"source": "factory", "factory": "sekron_search.demo:demo_data", "kwargs": {"seed": seed}},
            "budget": {"flops": "0.4x", "params": "0.4x", "latency_ms": "1.0x"},
            "calibration": {"samples": 512, "holdout": 512, "batch_size": 128},
            "search": {"trials": 40},
            "latency": {"batch_size": 64},
            "finetune": {"epochs": 12, "candidates": 2, "batch_size": 64, "label_weight": 0.3},
            "seed": seed,
            "out": out,
        }
    )
