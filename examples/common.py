"""What the examples share: a plain training loop, and an accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def train(
    model: nn.Module, dataset: Dataset[Any], loss: Callable[[Any, Any], Tensor], epochs: int, rate: float = 3e-3
) -> nn.Module:
    """Train a network on pairs of (inputs, target), inputs a list where the network takes several."""
    torch.manual_seed(0)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for inputs, target in loader:
            value = loss(model(*inputs) if isinstance(inputs, list) else model(inputs), target)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: nn.Module, *inputs: Tensor, labels: Tensor) -> float:
    """Share of the samples whose largest logit is their class's."""
    with torch.no_grad():
        return float((model(*inputs).argmax(1) == labels).float().mean())
