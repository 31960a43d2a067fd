"""Crops of an image by bicubic interpolation and by networks, beside the truth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.super_resolution.data import SCALE, Images, psnr, read_images

mpl.use("Agg")
import matplotlib.pyplot as plt

#: Of Set5, the image, and the corner and size of the crop in it.
IMAGE, TOP, LEFT, SIZE = 2, 96, 96, 96


@torch.no_grad()
def plot(archive: Path, networks: Mapping[str, nn.Module], path: Path) -> None:
    """Write the picture.

    Args:
        archive: The images.
        networks: By what they are called.
        path: Of the picture.
    """
    small, large = (image[None] for image in Images(read_images(archive)["set5"])[IMAGE])
    shown: dict[str, Tensor] = {
        "truth": large,
        "bicubic": F.interpolate(small, scale_factor=SCALE, mode="bicubic", align_corners=False).clamp(0, 1),
    }
    shown |= {name: network(small).clamp(0, 1) for name, network in networks.items()}
    figure, panels = plt.subplots(1, len(shown), figsize=(2.6 * len(shown), 3), constrained_layout=True)
    for axes, (name, image) in zip(panels, shown.items(), strict=True):
        crop = image[0, :, TOP : TOP + SIZE, LEFT : LEFT + SIZE]
        axes.imshow(crop.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(name if name == "truth" else f"{name}, {psnr(image, large):.2f} dB", fontsize=10)
        axes.axis("off")
    figure.savefig(path, dpi=130)
