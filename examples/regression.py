"""Regression: a multilayer perceptron on scikit-learn's diabetes data, with no classes anywhere.

python -m examples.regression
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sekron_search
from examples.common import train
from sekron_search.data import sample_order


def patients() -> tuple[TensorDataset, TensorDataset]:
    """Ten numbers of 442 patients, and how far the disease was a year later; 342 for training, 100 held out."""
    x, y = (torch.from_numpy(a).float() for a in load_diabetes(return_X_y=True))
    x, y = x / x.std(0), ((y - y.mean()) / y.std())[:, None]
    order = torch.tensor(sample_order(len(x), seed=0))
    training, held_out = (TensorDataset(x[part], y[part]) for part in (order[:342], order[342:]))
    return training, held_out


def neg_mse(model: nn.Module, dataset: TensorDataset) -> float:
    """Higher is better, as for every metric."""
    x, y = dataset.tensors
    with torch.no_grad():
        error: Tensor = F.mse_loss(model(x), y)
    return -float(error)


def main(epochs: int = 20, trials: int = 40, **settings: Any) -> sekron_search.Result:
    """Train the network, and keep a quarter of its parameters."""
    training, held_out = patients()
    model = nn.Sequential(nn.Linear(10, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))
    train(model, training, F.mse_loss, epochs, rate=1e-3)
    return sekron_search.compress(
        model,
        training.tensors[0][:1],
        budget={"params": "0.25x"},
        calibration=training.tensors[0],
        evaluate=lambda net: neg_mse(net, held_out),
        train=training,  # finetune.loss is "auto": squared errors, of the original's outputs and of the targets
        search={"trials": trials, "divergence": "mse"},
        **settings,
    )


if __name__ == "__main__":
    print(main().path / "report.html")
