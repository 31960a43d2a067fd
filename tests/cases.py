"""Factories: structures of every family, random factors, small networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sekron_search.data import DataBundle
from sekron_search.kron import families as fam
from sekron_search.kron.structure import Structure
from sekron_search.progress import Reporter, Task

SHAPE = (8, 6, 3, 3)

#: A structure of every family, by name.
STRUCTURES: dict[str, Structure] = {
    "dense": fam.dense(SHAPE),
    "channel SVD": fam.channel_svd(SHAPE, 3),
    "spatial SVD": fam.spatial_svd(SHAPE, 4),
    "spatial basis": fam.sekron([(8, 6, 1, 1), (1, 1, 3, 3)], [2]),
    "Kronecker": fam.sekron([(2, 3, 3, 1), (4, 2, 1, 3)], [3]),
    "SeKron S=3": fam.sekron([(2, 3, 1, 1), (2, 1, 3, 1), (2, 2, 1, 3)], [3, 2]),
    "SeKron S=4": fam.sekron([(2, 3, 1, 1), (2, 1, 3, 1), (2, 1, 1, 3), (1, 2, 1, 1)], [2, 3, 2]),
    "CP": fam.cp(SHAPE, 5),
    "depthwise CP": fam.depthwise_cp(SHAPE, 5),
    "Tucker": fam.tucker(SHAPE, [4, 3, 2, 2]),
    "Tucker-2": fam.tucker2(SHAPE, [4, 3]),
    "Tensor-Train": fam.tensor_train(SHAPE, [4, 3, 2]),
    "Tensor-Ring": fam.tensor_ring(SHAPE, [2, 3, 2, 2]),
    "Kronecker-CP": fam.kronecker([(2, 3, 3, 1), (2, 1, 1, 3), (2, 2, 1, 1)], "cp", [3]),
    "Kronecker-TT": fam.kronecker([(2, 3, 3, 1), (2, 1, 1, 3), (2, 2, 1, 1)], "tt", [3, 2]),
    "Kronecker-TR": fam.kronecker([(2, 3, 3, 1), (2, 1, 1, 3), (2, 2, 1, 1)], "tr", [2, 3, 2]),
    "Kronecker-Tucker": fam.kronecker([(2, 3, 3, 1), (2, 2, 1, 3), (2, 1, 1, 1)], "tucker", [3, 2]),
}

SHAPE_3D = (4, 6, 2, 3, 2)

#: Structures of a 3-d kernel, by name.
STRUCTURES_3D: dict[str, Structure] = {
    "dense": fam.dense(SHAPE_3D),
    "channel SVD": fam.channel_svd(SHAPE_3D, 3),
    "spatial SVD": fam.spatial_svd(SHAPE_3D, 4),
    "spatial basis": fam.sekron([(4, 6, 1, 1, 1), (1, 1, 2, 3, 2)], [2]),
    "Kronecker": fam.sekron([(2, 3, 1, 3, 1), (2, 2, 2, 1, 2)], [3]),
    "SeKron S=3": fam.sekron([(2, 3, 1, 1, 2), (2, 1, 2, 1, 1), (1, 2, 1, 3, 1)], [3, 2]),
    "CP": fam.cp(SHAPE_3D, 5),
    "depthwise CP": fam.depthwise_cp(SHAPE_3D, 5),
    "Tucker": fam.tucker(SHAPE_3D, [3, 3, 2, 2, 2]),
    "Tucker-2": fam.tucker2(SHAPE_3D, [4, 3]),
    "Tensor-Train": fam.tensor_train(SHAPE_3D, [4, 3, 2, 2]),
    "Tensor-Ring": fam.tensor_ring(SHAPE_3D, [2, 3, 2, 2, 2]),
    "Kronecker-TR": fam.kronecker([(2, 3, 1, 3, 1), (2, 1, 2, 1, 1), (1, 2, 1, 1, 2)], "tr", [2, 3, 2]),
}


def random_factors(structure: Structure, *, groups: int | None = None, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lead = () if groups is None else (groups,)
    return [torch.randn(*lead, *shape, generator=generator, dtype=torch.float64) for shape in structure.factor_shapes]


#: A layer of every kind, and the shape of an input for it.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 10), (3, 5, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 5, stride=2, padding=2, groups=2), (3, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1, dilation=2, padding_mode="circular"), (3, 6, 8, 9)),
    "conv2d, same": (lambda: nn.Conv2d(6, 8, (2, 4), padding="same"), (3, 6, 8, 9)),
    "conv2d, depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (3, 8, 7, 6)),
    "conv2d, prime channels": (lambda: nn.Conv2d(7, 13, 3, padding=1), (3, 7, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (3, 2, 3), stride=(1, 2, 1), padding=1), (3, 4, 4, 5, 6)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(6, 8, 4, stride=2, padding=1), (3, 6, 7)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(6, 8, (4, 3), 2, (1, 0), (1, 0), 2, dilation=(1, 2)), (3, 6, 5, 4)),
    "conv_transpose2d, stride 1": (lambda: nn.ConvTranspose2d(6, 8, 3, padding=3), (3, 6, 9, 8)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 6, (2, 3, 2), stride=2), (3, 4, 3, 4, 2)),
}


def layer_of(name: str) -> tuple[nn.Module, Tensor]:
    """A layer of `LAYERS` with random weights, and a random input."""
    build, shape = LAYERS[name]
    return build(), torch.randn(shape)


class SmallNet(nn.Module):
    """Convolutions with and without batch-norm and bias, a stride, a residual, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.conv3 = nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.conv2(x))
        x = F.relu(self.bn3(self.conv3(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def small_net(seed: int = 0) -> SmallNet:
    """A small network, trained just enough for its outputs to mean something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SmallNet()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    images, labels = blobs(256, seed=seed).tensors
    for step in range(30):
        chunk = slice(64 * (step % 4), 64 * (step % 4 + 1))
        loss = F.cross_entropy(model(images[chunk]), labels[chunk])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def blobs(count: int, seed: int = 0) -> TensorDataset:
    """Images of 8x8 with three channels, of four classes that differ in orientation and colour."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    wave = torch.sin(torch.arange(8) * 1.5)
    patterns = torch.stack([wave[:, None].expand(8, 8), wave[None, :].expand(8, 8)])
    images = 0.6 * torch.randn(count, 3, 8, 8, generator=generator)
    images += patterns[labels % 2][:, None] * torch.tensor([1.0, -1.0])[labels // 2][:, None, None, None]
    return TensorDataset(images, labels)


class OddLayers(nn.Module):
    """Depthwise layers, prime channels, and a layer too small to be factorized; images of 7 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(7, 7, 3, padding=1, groups=7)
        self.point = nn.Conv2d(7, 13, 1)
        self.scale = nn.Conv2d(13, 13, 1, groups=13)
        self.prime = nn.Conv2d(13, 13, 3, padding=1)
        self.head = nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.scale(self.point(self.spatial(x))))
        logits: Tensor = self.head(F.relu(self.prime(x)).mean((2, 3)))
        return logits


def net_of_odd_layers() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OddLayers()


def odd_data() -> DataBundle:
    train, validation, test = (TensorDataset(torch.randn(n, 7, 8, 8), torch.arange(n) % 3) for n in (128, 16, 16))
    return DataBundle(train, validation, test)


class SignalNet(nn.Module):
    """1-d convolutions, one of them transposed, and batch-norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 16, 5, padding=2, bias=False)
        self.norm = nn.BatchNorm1d(16)
        self.down = nn.Conv1d(16, 16, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose1d(16, 8, 4, stride=2, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.up(F.relu(self.down(x))))
        logits: Tensor = self.head(x.mean(2))
        return logits


class VolumeNet(nn.Module):
    """3-d convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(8)
        self.second = nn.Conv3d(8, 12, (3, 3, 2), stride=2, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        logits: Tensor = self.head(F.relu(self.second(x)).mean((2, 3, 4)))
        return logits


class ImageToImage(nn.Module):
    """A small network from images to images: down, and up again to the same size by a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.middle = nn.ConvTranspose2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1)
        self.last = nn.Conv2d(8, 3, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        seen = F.relu(self.norm(self.middle(F.relu(self.down(x)))))
        image: Tensor = self.last(F.relu(self.up(seen, output_size=x.shape[2:])))
        return image


def small_data() -> DataBundle:
    """A data factory for configurations."""
    return DataBundle(blobs(256, seed=0), blobs(64, seed=1), blobs(64, seed=2))


def nan_net() -> nn.Module:
    """A network whose outputs are NaN."""
    model = SmallNet()
    with torch.no_grad():
        next(model.bn3.buffers()).fill_(float("nan"))
    return model


#: Of configurations: few options, for most tests take the time of their fits. Without it there are enough for a search
#: to come to many networks.
SPACE = "space: {rank_levels: 4, max_options: 24}"

CONFIG = f"""
model: {{factory: "tests.cases:small_net"}}
data: {{source: factory, factory: "tests.cases:small_data"}}
budget: {{flops: 0.6x, params: 0.8x}}
{SPACE}
calibration: {{samples: 64, holdout: 128, batch_size: 32, refine_steps: 5, sequential_steps: 5}}
search: {{trials: 8}}
latency: {{batch_size: 4, rounds: 3}}
finetune: {{epochs: 2, batch_size: 32, candidates: 2}}
"""


def write_config(folder: Path, text: str = CONFIG, **replaced: str) -> Path:
    """A configuration file, pieces of its text replaced."""
    for old, new in replaced.items():
        text = text.replace(old, new)
    path = folder / "config.yaml"
    path.write_text(text)
    return path


class Noted(Reporter):
    """Keeps what it is told, of tasks the notes."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.notes: list[str] = []

    def say(self, text: str) -> None:
        self.told.append(text)

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Task]:
        notes = self.notes

        class Noting(Task):
            def update(self, done: int, note: str = "") -> None:
                notes.append(f"{description}: {note}")

        yield Noting(description, total)
