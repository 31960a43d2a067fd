"""Images in folders, one per class: which there are, their size, and reading them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from sekron_search.errors import DataError
from sekron_search.sections import DataConfig

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images of one folder per class, resized and normalised when they are read.

    Args:
        files: (path, class) of every image.
        size: (height, width) that they get.
        config: Normalisation.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], size: tuple[int, int], config: DataConfig) -> None:
        self.files = list(files)
        self.size = size
        self.mean = torch.tensor(config.mean)[:, None, None]
        self.std = torch.tensor(config.std)[:, None, None]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        mode = "L" if len(self.mean) == 1 else "RGB"
        height, width = self.size
        try:
            with Image.open(path) as image:
                # Pillow cuts off at 255 what has 16 bits, of which it calls those of some files 32.
                deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
                if image.mode in ("I", "F") and not deep:
                    raise DataError(
                        f"image {path}: its pixels are of mode {image.mode!r}, numbers of 32 bits that do not say "
                        "what is white; expected 8 or 16 bits: convert it, or give data.factory"
                    )
                whole = Image.fromarray(np.asarray(image).astype(np.float32) / 257) if deep else image.convert(mode)
                pixels = torch.from_numpy(np.array(whole.resize((width, height), Image.Resampling.BILINEAR)))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"image {path} cannot be read: {error}") from None
        pixels = pixels[None].expand(len(self.mean), -1, -1) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        return (pixels.float() / 255 - self.mean) / self.std, label


def common_size(root: Path, paths: Sequence[Path]) -> tuple[int, int]:
    """(height, width) of all images; their pixels are not read.

    Raises:
        DataError: If two of them differ, or one cannot be opened.
    """
    size = _image_size(paths[0])
    for path in paths[1:]:
        if (other := _image_size(path)) != size:
            raise DataError(
                f"data.path {root}: images of different sizes: {paths[0]} is {size[0]}x{size[1]} (height x width), "
                f"{path} is {other[0]}x{other[1]}. Say to which size all are resized, the one that the network was "
                "trained on: data.image_size in the config, or --set data.image_size=[224,224]"
            )
    return size


def _image_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error}") from None


def labelled(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Class names in alphabetical order, and (path, class) of every image."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise DataError(f"{folder}: expected a sub-folder per class, found none")
    files = []
    for label, name in enumerate(classes):
        own = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in _IMAGES)
        if not own:
            raise DataError(f"{folder / name}: the class folder holds no image (expected {', '.join(sorted(_IMAGES))})")
        files += [(path, label) for path in own]
    return classes, files
