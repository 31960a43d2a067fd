"""How the network's outputs respond to its layers' errors: one option of one layer at a time, then added up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn

from sekron_search.assembly import Assembler
from sekron_search.divergence import divergence
from sekron_search.files import read_json, write_json
from sekron_search.job import Job
from sekron_search.model import Inputs, batch_size, output_tensors, part_of, run_model
from sekron_search.network_tables import Tables
from sekron_search.progress import Reporter
from sekron_search.rundir import RunFolder
from sekron_search.search.options import Assignment, LayerTable

#: Held-out samples on which responses are recorded.
RESPONSE_SAMPLES = 128

#: The same for the tables, which have many options: the knapsack's solutions are as good as with twice as many.
TABLE_SAMPLES = 64

#: Fewer options of a layer tell nothing of how its response grows with its error.
LEAST_OPTIONS = 3

#: Responses are taken for no smaller than this, relative to the largest: what is left of a tiny one is rounding.
LEAST_RESPONSE = 1e-9


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
        self._inputs = first_samples(assembler.job.holdout, samples)
        self._original = self._outputs(assembler.skeleton(self._alone(0, 0)))
        self._known: dict[tuple[int, int], list[Tensor]] = {}

    def divergence(self, assignment: Assignment) -> float:
        """Of the outputs that an assignment is predicted to give; the responses that it takes are kept."""
        return self._divergence([self.response(layer, option) for layer, option in enumerate(assignment)])

    def divergence_alone(self, layer: int, option: int) -> float:
        """Of the outputs with one option of one layer in the original; the response is used if known, but not kept."""
        return self._divergence([self._known.get((layer, option)) or self._changes(layer, option)])

    def response(self, layer: int, option: int) -> list[Tensor]:
        """What the outputs change by when one option of one layer stands in the original."""
        key = (layer, option)
        if key not in self._known:
            self._known[key] = self._changes(layer, option)
        return self._known[key]

    def _changes(self, layer: int, option: int) -> list[Tensor]:
        changed = self._outputs(self._assembler.with_factors(self._alone(layer, option)))
        return [a - b for a, b in zip(changed, self._original, strict=True)]

    def _divergence(self, changes: Sequence[Sequence[Tensor]]) -> float:
        outputs = [z + sum(parts) for z, *parts in zip(self._original, *changes, strict=True)]
        return float(divergence(self._assembler.job.settings.search.divergence, outputs, self._original))

    def _alone(self, layer: int, option: int) -> tuple[int, ...]:
        return tuple(option if i == layer else 0 for i in range(len(self._assembler.tables.layers)))

    def _outputs(self, network: nn.Module) -> list[Tensor]:
        batches = [normalised_outputs(network, inputs) for inputs in self._inputs]
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]


@torch.no_grad()
def normalised_outputs(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The outputs when batch-norms normalise by the statistics of this batch; the network's own statistics change."""
    for module in network.eval().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return [t.float() for t in output_tensors(run_model(network, inputs))]


def first_samples(batches: Sequence[Inputs], samples: int) -> list[Inputs]:
    """The first so many samples, in the batches that they come in."""
    ends = list(accumulate(batch_size(inputs) for inputs in batches))
    starts = [0, *ends]
    return [
        part_of(inputs, slice(samples - start)) if end > samples else inputs
        for inputs, start, end in zip(batches, starts, ends, strict=False)
        if start < samples
    ]


def with_responses(job: Job, tables: Tables, folder: RunFolder, reporter: Reporter) -> Tables:
    """The tables with the responses to their options, or to so many of them that all cost no more than the trials.

    Where that is not enough for `LEAST_OPTIONS` of every layer, the tables stay as they are. What is measured of a
    layer is kept in the run folder.
    """
    held_out = sum(batch_size(inputs) for inputs in job.holdout)
    samples = min(TABLE_SAMPLES, held_out)
    wanted = spread_options([f.table for f in tables.fitted], most=job.settings.search.trials * held_out // samples)
    if not wanted:
        return tables
    known: dict[str, list[list[float]]] = read_json(folder.responses) if folder.responses.exists() else {}
    linear, done = LinearResponse(Assembler(job, tables), samples), 0
    with reporter.task("measuring responses", sum(map(len, wanted))) as task:
        for layer, (fitted, options) in enumerate(zip(tables.fitted, wanted, strict=True)):
            name, errors = fitted.table.name, [fitted.table.options[i].error for i in options]
            if [error for error, _ in known.get(name, [])] != errors:
                found = []
                for option, error in zip(options, errors, strict=True):
                    found.append([error, linear.divergence_alone(layer, option)])
                    task.update(done + len(found), name)
                known[name] = found
                write_json(folder.responses, known)
            done += len(options)
            task.update(done, name)
    return _with(tables, known)


def spread_options(tables: Sequence[LayerTable], most: int) -> list[list[int]]:
    """For every layer as many options, spread evenly over the logarithm of their errors, by increasing error.

    Of options of equal error one stands for all; those without an error are left out.

    Args:
        tables: Of the layers.
        most: Options of all layers together.

    Returns:
        None at all if `most` are too few for `LEAST_OPTIONS` of every layer that has so many.
    """
    differing = [list({o.error: i for i, o in enumerate(table.options) if o.error > 0}.items()) for table in tables]
    quota = max(map(len, differing), default=0)
    while quota >= LEAST_OPTIONS and sum(min(quota, len(own)) for own in differing) > most:
        quota -= 1
    if quota < LEAST_OPTIONS or not all(differing):
        return []
    return [[own[i][1] for i in _spread([error for error, _ in own], quota)] for own in map(sorted, differing)]


def _spread(errors: Sequence[float], count: int) -> list[int]:
    """So many of some increasing errors, the first and the last among them, spread evenly over their logarithms."""
    left = list(range(len(errors)))
    logs = np.log(errors)
    while len(left) > count:
        gaps = [logs[left[i + 1]] - logs[left[i - 1]] for i in range(1, len(left) - 1)]
        del left[1 + int(np.argmin(gaps))]
    return left


def _with(tables: Tables, found: Mapping[str, Sequence[Sequence[float]]]) -> Tables:
    """The tables, and those of all options, with the responses of their layers."""
    largest = max(response for own in found.values() for _, response in own)
    # What is left of a tiny one is rounding, and may be negative.
    least = max(LEAST_RESPONSE * largest, float(np.finfo(float).tiny))

    def told(table: LayerTable) -> LayerTable:
        own = tuple((error, max(response, least)) for error, response in found[table.name])
        return dataclasses.replace(table, responses=own)

    fitted = tuple(dataclasses.replace(f, table=told(f.table)) for f in tables.fitted)
    whole = tables.whole and dataclasses.replace(tables.whole, tables=tuple(map(told, tables.whole.tables)))
    return dataclasses.replace(tables, fitted=fitted, whole=whole)
