"""Images for twofold super-resolution: patches of BSD100 for training, whole images for the metric."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from sekron_search import DataBundle

SCALE = 2

#: Pixels of a low-resolution patch, and patches of every training image.
PATCH, PATCHES = 32, 20

#: Pixels at the border of a large image that do not count: an upsampling has less to go by there.
BORDER = 2

#: Weights of red, green and blue in luma, ITU-R BT.601.
LUMA = (65.481, 128.553, 24.966)


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of a small image and the large one, (3, H, W) and (3, 2 H, 2 W) in [0, 1].

    Args:
        large: The large images; they are cropped to even sizes.
    """

    def __init__(self, large: list[Tensor]) -> None:
        self.large = [cropped(image) for image in large]
        self.small = [smaller(image[None])[0] for image in self.large]

    def __len__(self) -> int:
        return len(self.large)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.small[index], self.large[index]


def super_resolution(archive: str, seed: int = 0) -> DataBundle:
    """Patches of BSD100, turned and mirrored; Set14 for choosing; Set5, touched once.

    Args:
        archive: A tar file with the folders bsd100, set14 and set5.
        seed: Of the patches.
    """
    images = read_images(Path(archive))
    return DataBundle(patches(images["bsd100"], seed), Images(images["set14"]), Images(images["set5"]))


def read_images(archive: Path) -> dict[str, list[Tensor]]:
    """By folder, the images in the order of their names, (3, H, W) in [0, 1]."""
    found: dict[str, list[tuple[str, Tensor]]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() and member.name.endswith(".png") else None
            if content is not None:
                pixels = np.array(Image.open(io.BytesIO(content.read())).convert("RGB"))
                image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
                found.setdefault(member.name.split("/")[-2], []).append((member.name, image))
    return {folder: [image for _, image in sorted(own, key=lambda pair: pair[0])] for folder, own in found.items()}


def patches(large: list[Tensor], seed: int) -> TensorDataset:
    """Random patches of every image, each in one of the eight orientations of a square."""
    generator = torch.Generator().manual_seed(seed)
    size, found = SCALE * PATCH, []
    for image in map(cropped, large):
        for _ in range(PATCHES):
            # Even positions, so that a patch made smaller is a patch of the image made smaller, but for its border.
            top, left = (
                SCALE * int(torch.randint((n - size) // SCALE + 1, (), generator=generator)) for n in image.shape[1:]
            )
            patch = image[:, top : top + size, left : left + size]
            turns, mirrored = (int(torch.randint(n, (), generator=generator)) for n in (4, 2))
            patch = patch.rot90(turns, (1, 2))
            found.append(patch.flip(2) if mirrored else patch)
    batch = torch.stack(found)
    return TensorDataset(smaller(batch), batch)


def smaller(images: Tensor) -> Tensor:
    """(N, 3, H, W) at half the size by bicubic interpolation with antialiasing, rounded to 8 bits."""
    size = [n // SCALE for n in images.shape[2:]]
    small = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    return in_8_bits(small)


def in_8_bits(images: Tensor) -> Tensor:
    """As a file would hold them: clipped to [0, 1], rounded to multiples of 1 / 255."""
    return (images.clamp(0, 1) * 255).round() / 255


def cropped(image: Tensor) -> Tensor:
    """(3, H, W) without what is left over of the scale."""
    height, width = (n - n % SCALE for n in image.shape[1:])
    return image[:, :height, :width]


def luma(images: Tensor) -> Tensor:
    """(N, H, W) of (N, 3, H, W), in [0, 1]."""
    weights = torch.tensor(LUMA, device=images.device, dtype=images.dtype) / 255
    return torch.einsum("nchw,c->nhw", images, weights) + 16 / 255


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the luma of an image (1, 3, H, W), rounded to 8 bits, without its border."""
    kept = slice(BORDER, -BORDER)
    error = (luma(in_8_bits(output)) - luma(target))[:, kept, kept].double().square().mean()
    return float(-10 * error.clamp_min(1e-12).log10())


@torch.no_grad()
def luma_psnr(network: nn.Module, dataset: Images) -> float:
    """The metric: averaged over the images, which may differ in size."""
    device = next(network.parameters()).device
    pairs = (dataset[i] for i in range(len(dataset)))
    values = [psnr(network(small[None].to(device)), large[None].to(device)) for small, large in pairs]
    return float(np.mean(values))
