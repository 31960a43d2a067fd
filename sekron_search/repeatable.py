"""Whether a network gives the same outputs for the same inputs again: all that is measured of it depends on that."""

from __future__ import annotations

import torch
from torch import nn

from sekron_search.errors import DataError
from sekron_search.model import Inputs, output_tensors, run_model

#: Relative to the largest output; sums in another order, as GPUs make them, differ by much less.
TOLERANCE = 1e-3


@torch.no_grad()
def check_repeatable(model: nn.Module, inputs: Inputs) -> None:
    """Refuse a network that draws random numbers in evaluation mode, or keeps state from one pass to the next.

    Args:
        model: It is put into evaluation mode.
        inputs: A batch.

    Raises:
        DataError: Names the buffers that a pass changes, or says how far outputs differ.
    """
    model.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    first, second = (output_tensors(run_model(model, inputs)) for _ in range(2))
    changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
    if changed:
        raise DataError(
            f"the network changes its buffers in evaluation mode ({', '.join(changed[:5])}): it keeps state from one "
            "pass to the next, so nothing measured of it would hold; make forward leave them alone in evaluation mode"
        )
    for a, b in zip(first, second, strict=True):
        largest = a.double().abs().max()
        apart = float((a.double() - b.double()).abs().max() / largest) if a.shape == b.shape else float("inf")
        if apart > TOLERANCE:
            raise DataError(
                f"the network's outputs for the same inputs differ from one pass to the next (by {apart:.1e} of the "
                "largest, in evaluation mode): it draws random numbers or keeps state; dropout and noise have to ask "
                "for self.training"
            )
