"""Whether a network gives the same outputs for the same inputs again: all that is measured of it depends on that."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sekron_search.deployment import relative_difference
from sekron_search.errors import DataError
from sekron_search.model import Inputs, output_tensors, run_model

#: Relative to the largest output; sums in another order, as GPUs make them, differ by much less.
TOLERANCE = 1e-3


@torch.no_grad()
def check_repeatable(model: nn.Module, inputs: Inputs) -> None:
    """Refuse a network that draws random numbers in evaluation mode, or keeps state from one pass to the next.

    Args:
        model: It is put into evaluation mode. What its first pass computes and keeps (a table of positions, say) is
            no state, as long as the next pass leaves it alone.
        inputs: A batch.

    Raises:
        DataError: Names the buffers that a pass changes, or says how far outputs differ.
    """
    model.eval()
    # Copies, for a network may write into what it returned before.
    first = [output.clone() for output in output_tensors(run_model(model, inputs))]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    second = output_tensors(run_model(model, inputs))
    changed = [name for name, buffer in model.named_buffers() if not _same(buffer, before.get(name))]
    if changed:
        raise DataError(
            f"the network changes its buffers in evaluation mode ({', '.join(changed[:5])}): it keeps state from one "
            "pass to the next, so nothing measured of it would hold; make forward leave them alone in evaluation mode"
        )
    if (apart := relative_difference(first, second)) > TOLERANCE:
        raise DataError(
            f"the network's outputs for the same inputs differ from one pass to the next (by {apart:.1e} of the "
            "largest, in evaluation mode): it draws random numbers or keeps state; dropout and noise have to ask "
            "for self.training"
        )


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors are equal, NaN in the same places included."""
    if other is None or tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    return torch.equal(tensor, other) or torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True)
