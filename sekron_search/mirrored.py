"""What a network says of images and of their mirror images, as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sekron_search.divergence import DivergenceName, divergence
from sekron_search.errors import DataError
from sekron_search.model import Inputs, shapes
from sekron_search.nested import leaves, map_leaves, map_tensors, tensors

#: Axes of the smallest image batch: (N, C, H, W); the last one is mirrored.
IMAGE_AXES = 4

#: Outputs that diverge by more than this from their mean with mirror images are not alike on both sides: the ResNet-20
#: of the benchmarks is at 0.26, and at 3.6 where images are turned upside down instead.
APART = 0.45

_KEY = "finetune.mirrored_teacher"


@torch.no_grad()
def mean_with_mirrored(network: nn.Module, inputs: Inputs, output: Any) -> Any:
    """The mean of a network's output for images, and of that for their mirror images.

    Where left and right do not matter, both are right, and their mean errs less than either: the mean of several views
    is a better teacher than one of them. Tensors of four or more axes, (N, C, ..., W), are images, in outputs as in
    inputs, and mirrored back there; outputs (N,) and (N, K) are of whole images. In float32, or float64.

    Args:
        network: In evaluation mode.
        inputs: Its arguments.
        output: What it makes of them.

    Raises:
        DataError: If there is no image in the inputs, or an output is neither an image nor of a whole one.

    Source: Radosavovic et al. 2018, Data Distillation: Towards Omni-Supervised Learning (arXiv 1712.04440).
    """
    image = next(filter(_is_image, tensors(inputs)), None)
    if image is None:
        raise DataError(
            f"{_KEY}: expected images (N, C, H, W) among the network's arguments, got tensors of shapes "
            f"[{shapes(inputs)}]; set it to false"
        )
    mirrored = network(*map_tensors(_mirror_images, inputs))
    if shapes(mirrored) != shapes(output):
        raise DataError(
            f"{_KEY}: the outputs for images are of shapes [{shapes(output)}], those for their mirror images of "
            f"[{shapes(mirrored)}]; expected the same, which a network that selects outputs by their values does not "
            "give; set it to false"
        )
    others = iter(leaves(mirrored))

    def mean(own: Any) -> Any:
        other = next(others)
        if not isinstance(own, Tensor) or not own.is_floating_point():
            return own
        if own.dim() != image.dim() and not (own.dim() in (1, 2) and len(own) == len(image)):
            raise DataError(
                f"{_KEY}: the network makes an output of shape {tuple(own.shape)} of images of shape "
                f"{tuple(image.shape)}; expected images too, (N, C, H, W), which can be mirrored back, or (N, K) of "
                "whole images; set it to false"
            )
        wide = torch.promote_types(own.dtype, torch.float32)
        return (own.to(wide) + _mirror_images(other).to(wide)) / 2

    return map_leaves(mean, output)


def check_alike(name: DivergenceName, output: Any, mean: Any) -> None:
    """See that left and right matter little to a network.

    Args:
        name: How outputs are compared.
        output: Of the network, for images as they are.
        mean: `mean_with_mirrored` of it.

    Raises:
        DataError: If they do matter.
    """
    found = float(divergence(name, output, mean))
    if not found <= APART:
        raise DataError(
            f"{_KEY}: the network's outputs for images diverge by {found:.2g} from their mean with those for mirror "
            f"images; expected {APART} at most, as where left and right do not matter and outputs that are images have "
            "the width as their last axis; set it to false"
        )


def _is_image(tensor: Tensor) -> bool:
    return tensor.dim() >= IMAGE_AXES


def _mirror_images(tensor: Tensor) -> Tensor:
    return tensor.flip(-1) if _is_image(tensor) else tensor
