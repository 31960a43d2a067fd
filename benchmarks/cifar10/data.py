"""CIFAR-10 as JPEG files in a tar archive, decoded once into a cache outside of the repository."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from sekron_search import DataBundle
from sekron_search.tensor_files import read_tensors, write_tensors

MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
VALIDATION = 5000


def cifar10(archive: str, split_seed: int = 0) -> DataBundle:
    """45,000 training images, 5,000 of the training images for validation, the 10,000 test images."""
    pixels = _decoded(Path(archive))
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(split_seed))
    images, labels = _normalised(pixels["train"]), pixels["train_labels"].long()
    validation, train = order[:VALIDATION], order[VALIDATION:]
    return DataBundle(
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[validation], labels[validation]),
        TensorDataset(_normalised(pixels["test"]), pixels["test_labels"].long()),
        augment=crop_and_flip,
    )


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of the image padded by four pixels, half of them mirrored (He et al. 2015)."""
    count, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = (torch.randint(0, 9, (count,), generator=generator) for _ in range(2))
    mirrored = torch.rand(count, generator=generator) < 0.5
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    samples = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _normalised(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - MEAN) / STD


def _decoded(archive: Path) -> dict[str, Tensor]:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sekron_search"
    decoded = cache / f"cifar10-{archive.stat().st_size}.safetensors"
    if not decoded.exists():
        print(f"decoding {archive} once into {decoded}")
        write_tensors(decoded, _decode(archive))
    return read_tensors(decoded)


def _decode(archive: Path) -> dict[str, Tensor]:
    files: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                files[member.name] = content.read()
    classes = sorted({name.split("/")[-2] for name in files})
    tensors = {}
    for split in ("train", "test"):
        names = sorted(name for name in files if name.split("/")[-3] == split)
        images = [np.array(Image.open(io.BytesIO(files[name])).convert("RGB")) for name in names]
        tensors[split] = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        tensors[f"{split}_labels"] = torch.tensor([classes.index(name.split("/")[-2]) for name in names])
    return tensors
