"""From an assignment to a network, and how far its outputs are from the original's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from sekron_search.costs.traced import NormStatistics, reestimate_batch_norm
from sekron_search.divergence import mean_divergence
from sekron_search.errors import is_out_of_memory
from sekron_search.job import Job
from sekron_search.kron.layer import KroneckerLayer
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from sekron_search.model import Inputs, batch_size, first_batches, layer_like, replace_layers
from sekron_search.network_tables import Tables
from sekron_search.search.options import Assignment
from sekron_search.search.trial import Evaluation, Trial
from sekron_search.sequential import fit_sequentially

#: Samples on which a trial's batch-norm statistics are seen to change; more hardly changes a divergence.
NORM_SAMPLES = 128

#: A trial is given up when it is behind a cheaper network by so many standard errors of their difference, after so many
#: batches of the held-out samples at least: by Student's distribution an equal one is given up once in a thousand.
PRUNING_ERRORS, PRUNING_BATCHES = 6.0, 6


class Assembler:
    """Makes networks of assignments.

    Args:
        job: The network, and the inputs.
        tables: What every layer can become.
    """

    def __init__(self, job: Job, tables: Tables) -> None:
        self.job, self.tables = job, tables

    def assemble(self, assignment: Assignment) -> nn.Module:
        """The network with the fitted factors, biases and batch-norm statistics corrected for what changed."""
        network = self.with_factors(assignment)
        reestimate_batch_norm(network, self.job.calibration, original=self._statistics)
        return network

    def evaluate(self, assignment: Assignment, rivals: Sequence[Trial] = ()) -> Evaluation:
        """The divergence of an assignment's network on the held-out inputs.

        Args:
            assignment: Option of every layer.
            rivals: Trials of cheaper networks: what is clearly behind one of them is not measured to the end.

        Returns:
            What it gave; an infinite divergence, with a warning, if there was not enough memory for it.
        """
        try:
            return self._evaluate(assignment, rivals)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            warnings.warn(
                f"a trial ran out of memory and counts as worse than all others: {error}", RuntimeWarning, stacklevel=2
            )
            return Evaluation(math.inf)

    def _evaluate(self, assignment: Assignment, rivals: Sequence[Trial]) -> Evaluation:
        network = self.with_factors(assignment)
        reestimate_batch_norm(network, self._few, original=self._few_statistics)
        partial: list[float] = []
        for number, inputs in enumerate(self.job.holdout):
            partial.append(self._divergence(network, number, inputs))
            ahead = next((r for r in rivals if self._is_behind(partial, r.partial)), None)
            if ahead is not None and len(partial) < len(self.job.holdout):
                seen = len(partial)
                share = self._mean(partial) / max(self._mean(ahead.partial[:seen]), 1e-12)
                return Evaluation(ahead.divergence * share, tuple(partial), pruned=True)
        return Evaluation(self._mean(partial), tuple(partial))

    def divergence(self, network: nn.Module) -> float:
        """Of a network's outputs on the held-out inputs."""
        name = self.job.settings.search.divergence
        return mean_divergence(name, network, self.job.holdout, self.job.references)

    def fit(self, network: nn.Module, progress: Callable[[int], None] | None = None) -> float:
        """Fit a network layer after layer, in place; undone if that does not lower its divergence, which is returned.

        Args:
            network: From `assemble`.
            progress: Called with the number of layers done.
        """
        before, steps = self.divergence(network), self.job.settings.calibration.sequential_steps
        if steps == 0:
            return before
        start = {name: t.clone() for name, t in network.state_dict().items()}
        fit_sequentially(
            network,
            self.job.model,
            self.tables.layers,
            self.job.calibration,
            steps=steps,
            curvature=self.job.curvature,
            trained=self._statistics,
            progress=progress,
        )
        after = self.divergence(network)
        if after > before:
            network.load_state_dict(start)
        return min(after, before)

    def with_factors(self, assignment: Assignment) -> nn.Module:
        """The network with the fitted factors, the biases corrected."""
        network = self.skeleton(assignment)
        for info, fitted, index in zip(self.tables.layers, self.tables.fitted, assignment, strict=True):
            if fitted.table.options[index].is_original:
                continue
            layer, dense = network.get_submodule(info.name), self.job.model.get_submodule(info.name)
            assert isinstance(layer, KroneckerLayer)
            layer.set_factors([a.to(self.job.device) for a in fitted.factors[index]])
            shift = fitted.shifts[index]
            if layer.bias is not None:
                assert isinstance(dense.bias, Tensor)
                correction = shift.to(layer.bias) if info.output_shift == "correctable" and shift is not None else 0.0
                with torch.no_grad():
                    layer.bias.copy_(dense.bias + correction)
        return network

    def alone(self, layer: int, option: int) -> nn.Module:
        """The original with one option of one layer, named by their numbers; option 0 gives a copy of the original."""
        return self.with_factors(tuple(option if i == layer else 0 for i in range(len(self.tables.layers))))

    def skeleton(self, assignment: Assignment) -> nn.Module:
        """The network with the layers of an assignment, all their weights zero."""
        layers = {}
        for info, fitted, index in zip(self.tables.layers, self.tables.fitted, assignment, strict=True):
            option = fitted.table.options[index]
            if not option.is_original:
                structure, schedule = Structure.parse(option.structure), Schedule.parse(option.schedule)
                layers[info.name] = layer_like(
                    self.job.model, info.name, structure, schedule=schedule, execution=option.execution
                )
        return replace_layers(self.job.model, layers).eval()

    def _divergence(self, network: nn.Module, number: int, inputs: Inputs) -> float:
        with torch.no_grad():
            name = self.job.settings.search.divergence
            return mean_divergence(name, network, [inputs], self.job.references[number : number + 1])

    def _is_behind(self, partial: Sequence[float], other: Sequence[float]) -> bool:
        seen = len(partial)
        if seen < PRUNING_BATCHES or len(other) < seen:
            return False
        difference = np.array(partial) - np.array(other[:seen])
        return bool(difference.mean() > PRUNING_ERRORS * difference.std(ddof=1) / seen**0.5)

    def _mean(self, partial: Sequence[float]) -> float:
        """Over the samples of the first batches."""
        sizes = self._sizes[: len(partial)]
        return float(np.average(partial, weights=sizes))

    @cached_property
    def _sizes(self) -> list[int]:
        return [batch_size(inputs) for inputs in self.job.holdout]

    @cached_property
    def _few(self) -> Sequence[Inputs]:
        """The first calibration batches, of so many samples as a trial needs."""
        return first_batches(self.job.calibration, NORM_SAMPLES)

    @cached_property
    def _statistics(self) -> NormStatistics:
        return NormStatistics(self.job.model, self.job.calibration)

    @cached_property
    def _few_statistics(self) -> NormStatistics:
        return NormStatistics(self.job.model, self._few)
