"""Several outputs in a dictionary, a metric and a loss of one's own: masks and boxes of discs and bars, drawn by PIL.

python -m examples.segmentation
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import StackDataset

import sekron_search
from examples.common import train

SIZE, CLASSES = 16, 3


class Segmenter(nn.Module):
    """Takes images (N, 3, 16, 16), gives {"mask": logits (N, 3, 16, 16), "box": corners (N, 4) in [0, 1]}."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
        self.mask = nn.Conv2d(32, CLASSES, 1)
        self.box = nn.Linear(32 * 16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """What the picture shows, and where."""
        x = self.body(self.stem(x))
        return {"mask": self.mask(x), "box": self.box(F.avg_pool2d(x, 4).flatten(1)).sigmoid()}


def drawn(count: int, seed: int) -> StackDataset[Any]:
    """Noisy pictures of a disc or a bar; targets have the names of the outputs."""
    rng = np.random.default_rng(seed)
    images, masks, boxes = [], [], []
    for _ in range(count):
        kind, (width, height) = int(rng.integers(1, CLASSES)), rng.integers(4, 9, 2)
        left, top = rng.integers(0, SIZE - width), rng.integers(0, SIZE - height)
        corners = [int(v) for v in (left, top, left + width, top + height)]
        picture = Image.new("L", (SIZE, SIZE))
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if kind == 1 else draw.rectangle)(corners, fill=kind)
        masks.append(torch.from_numpy(np.array(picture)).long())
        colours = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.2, 0.4], [0.3, 1.0, 0.6]])[masks[-1]].permute(2, 0, 1)
        images.append(colours + 0.3 * torch.from_numpy(rng.standard_normal((3, SIZE, SIZE))).float())
        boxes.append(torch.tensor(corners) / SIZE)
    parts: list[Any] = [torch.stack(images), torch.stack(masks), torch.stack(boxes)]  # tensors will do as datasets
    return StackDataset(parts[0], StackDataset(mask=parts[1], box=parts[2]))


def loss(output: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    """What the network is trained by, and what fine-tuning compares with the targets by."""
    return F.cross_entropy(output["mask"], target["mask"]) + 5 * F.mse_loss(output["box"], target["box"])


def mean_iou(model: nn.Module, dataset: StackDataset[Any]) -> float:
    """Intersection over union of the masks, averaged over the classes."""
    images, targets = dataset.datasets
    with torch.no_grad():
        found, wanted = model(images)["mask"].argmax(1), targets.datasets["mask"]
    both = [((found == c) & (wanted == c)).sum() / ((found == c) | (wanted == c)).sum() for c in range(CLASSES)]
    return float(torch.stack(both).mean())


def main(epochs: int = 20, trials: int = 40, finetune_epochs: int = 3, **settings: Any) -> sekron_search.Result:
    """Train the network, and keep 0.4 of its multiply-adds."""
    training, validation = drawn(512, seed=0), drawn(128, seed=1)
    model = train(Segmenter(), training, loss, epochs)
    return sekron_search.compress(
        model,
        training.datasets[0][:8],
        budget={"flops": "0.4x"},
        calibration=training,  # the targets are not looked at
        evaluate=lambda net: mean_iou(net, validation),
        train=training,
        search={"trials": trials, "divergence": "mse"},  # one output has no classes: compare values, not logits
        finetune={"epochs": finetune_epochs, "loss": "examples.segmentation:loss"},
        **settings,
    )


if __name__ == "__main__":
    print(main().path / "report.html")
