"""What a network says of images and of their mirror images, as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sekron_search.errors import DataError
from sekron_search.model import Inputs, run_model
from sekron_search.nested import leaves, map_leaves, map_tensors, tensors

#: Axes of the smallest image batch: (N, C, H, W); the last one is mirrored.
IMAGE_AXES = 4


@torch.no_grad()
def mean_with_mirrored(network: nn.Module, inputs: Inputs, output: Any) -> Any:
    """The mean of a network's output for images, and of that for their mirror images.

    Where left and right do not matter, both are right, and their mean errs less than either: the mean of several views
    is a better teacher than one of them. Tensors of four or more axes, (N, C, ..., W), are images, in outputs as in
    inputs, and mirrored back there; outputs (N, K) are of whole images.

    Args:
        network: In evaluation mode.
        inputs: Its arguments.
        output: What it makes of them.

    Raises:
        DataError: If there is no image in the inputs, or an output is neither an image nor of a whole one.

    Source: Radosavovic et al. 2018, Data Distillation: Towards Omni-Supervised Learning (arXiv 1712.04440).
    """
    if not any(map(_is_image, tensors(inputs))):
        raise DataError(
            "finetune.mirrored_teacher: expected images (N, C, H, W) among the network's arguments, got tensors of "
            f"shapes {[tuple(tensor.shape) for tensor in tensors(inputs)]}; set it to false"
        )
    others = iter(leaves(run_model(network, map_tensors(_mirror_images, inputs))))

    def mean(own: Any) -> Any:
        other = next(others)
        if not isinstance(own, Tensor) or not own.is_floating_point():
            return own
        if own.dim() > 2 and not _is_image(own):
            raise DataError(
                f"finetune.mirrored_teacher: the network has an output of shape {tuple(own.shape)}; expected images "
                "(N, C, H, W), which can be mirrored back, or (N, K) of whole images; set it to false"
            )
        return (own + _mirror_images(other)) / 2

    return map_leaves(mean, output)


def _is_image(tensor: Tensor) -> bool:
    return tensor.dim() >= IMAGE_AXES


def _mirror_images(tensor: Tensor) -> Tensor:
    return tensor.flip(-1) if _is_image(tensor) else tensor
