"""How the network's outputs respond to its layers' errors: one option of one layer at a time, then added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sekron_search.assembly import Assembler
from sekron_search.divergence import divergence
from sekron_search.model import Inputs, output_tensors, part_of, run_model
from sekron_search.search.options import Assignment

#: Held-out samples on which responses are recorded.
RESPONSE_SAMPLES = 128


class LinearResponse:
    """Predicts the divergence of any assignment from the responses to its options, each on its own.

    With z the outputs and d_lo what they change by when option o of layer l is the only one that is not the
    original, an assignment's outputs are taken for z + sum of its d_lo. So errors of layers may add up, cancel, or be
    carried on with any weight: what is left out is how one layer's error changes another's. The divergence of those
    outputs from z costs no pass through the network; a response costs one, the first time it is needed.

    Batch-norms normalise by the statistics of the batch, with the original as with the options: so a response has in
    it what becomes of the error when the statistics are estimated again.

    Args:
        assembler: Makes the networks.
        samples: Held-out samples on which the responses are recorded.
    """

    def __init__(self, assembler: Assembler, samples: int = RESPONSE_SAMPLES) -> None:
        self._assembler = assembler
        self._inputs = part_of(assembler.job.holdout[0], slice(samples))
        self._responses: dict[tuple[int, int], list[Tensor]] = {}
        self._original = normalised_outputs(assembler.alone(0, 0), self._inputs)

    def divergence(self, assignment: Assignment) -> float:
        """Of the outputs that an assignment is predicted to give."""
        return self._divergence([self.response(layer, option) for layer, option in enumerate(assignment)])

    def divergence_alone(self, layer: int, option: int) -> float:
        """Of the outputs with one option of one layer in the original."""
        return self._divergence([self.response(layer, option)])

    def response(self, layer: int, option: int) -> list[Tensor]:
        """What the outputs change by when one option of one layer stands in the original."""
        key = (layer, option)
        if key not in self._responses:
            changed = normalised_outputs(self._assembler.alone(layer, option), self._inputs)
            self._responses[key] = [a - b for a, b in zip(changed, self._original, strict=True)]
        return self._responses[key]

    def _divergence(self, changes: Sequence[Sequence[Tensor]]) -> float:
        outputs = [z + sum(parts) for z, *parts in zip(self._original, *changes, strict=True)]
        return float(divergence(self._assembler.job.settings.search.divergence, outputs, self._original))


@torch.no_grad()
def normalised_outputs(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The outputs when batch-norms normalise by the statistics of this batch; the network's own statistics change."""
    for module in network.eval().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return [t.float() for t in output_tensors(run_model(network, inputs))]
