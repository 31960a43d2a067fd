"""What options do to the network's outputs, each alone in the original: measured before a search, for its tables."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from sekron_search.assembly import Assembler
from sekron_search.divergence import divergence
from sekron_search.errors import RunFolderError, is_out_of_memory
from sekron_search.files import read_json, write_json
from sekron_search.job import Job
from sekron_search.model import batch_size, first_batches
from sekron_search.network_tables import Tables
from sekron_search.progress import Reporter
from sekron_search.response import normalised_outputs
from sekron_search.search.options import LayerTable
from sekron_search.tensor_files import digest

#: Held-out samples on which a response is measured, in whole batches: the knapsack's solutions are as good as with
#: twice as many.
SAMPLES = 64

#: Of how responses are measured: those of another version are measured anew.
RESPONSE_VERSION = 1

#: Fewer options of a layer tell nothing of how its response grows with its error.
LEAST_OPTIONS = 3

#: Responses are made out down to this, relative to the largest: what is left of smaller ones is rounding.
LEAST_RESPONSE = 1e-6

#: A response that is NaN or infinite counts as so many times the largest of the others.
BROKEN = 2.0


def with_responses(job: Job, tables: Tables, cache: Path, reporter: Reporter) -> Tables:
    """The tables with the responses to their options: to so many of them that no more samples pass than for the trials.

    Where that is not enough for `LEAST_OPTIONS` of every layer, the tables stay as they are. What is measured of a
    layer is kept.

    Args:
        job: The network, and the held-out inputs.
        tables: Of its layers.
        cache: Folder of the tables.
        reporter: Told of the progress.
    """
    batches = first_batches(job.holdout, SAMPLES)
    held_out, used = (sum(map(batch_size, part)) for part in (job.holdout, batches))
    wanted = spread_options([f.table for f in tables.fitted], most=job.settings.search.trials * held_out // used)
    if not any(wanted):
        reporter.say("no responses are measured: that would take more than the trials")
        return tables
    path = cache / f"responses-{_key(job, tables, wanted)}.json"
    known: dict[str, _Rows] = {**{f.table.name: [] for f in tables.fitted}, **_read(path)}
    alone = _Alone(Assembler(job, tables), len(batches))
    done = 0
    with reporter.task("measuring responses", sum(map(len, wanted))) as task:
        for layer, (fitted, options) in enumerate(zip(tables.fitted, wanted, strict=True)):
            name, errors = fitted.table.name, [fitted.table.options[i].error for i in options]
            if [error for error, _ in known[name]] != errors:
                known[name] = []
                for option, error in zip(options, errors, strict=True):
                    response = alone.divergence(layer, option)
                    known[name].append((error, response if math.isfinite(response) else None))
                    task.update(done + len(known[name]), name)
                write_json(path, {"layers": known})
            done += len(options)
            task.update(done, name)
    return dataclasses.replace(_with(tables, known), files=(*tables.files, path))


class _Alone:
    """Measures networks in which one option of one layer is not the original.

    Batch-norms normalise by the statistics of the batch, with the original as with the options: so a response has in
    it what becomes of the error when the statistics are estimated again.

    Args:
        assembler: Makes the networks.
        batches: So many of the held-out ones.
    """

    def __init__(self, assembler: Assembler, batches: int) -> None:
        self._assembler, self._name = assembler, assembler.job.settings.search.divergence
        self._inputs = assembler.job.holdout[:batches]
        self._originals: list[list[Tensor]] = []

    def divergence(self, layer: int, option: int) -> float:
        """From the original, averaged over the samples; infinite, with a warning, without enough memory for it."""
        if not self._originals:
            original = self._assembler.alone(0, 0)
            self._originals = [normalised_outputs(original, inputs) for inputs in self._inputs]
        try:
            network = self._assembler.alone(layer, option)
            found = [
                float(divergence(self._name, normalised_outputs(network, inputs), original))
                for inputs, original in zip(self._inputs, self._originals, strict=True)
            ]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            name = self._assembler.tables.layers[layer].name
            told = f"an option of layer '{name}' ran out of memory and counts as worse than all others: {error}"
            warnings.warn(told, RuntimeWarning, stacklevel=2)
            return math.inf
        return float(np.average(found, weights=[batch_size(inputs) for inputs in self._inputs]))


def spread_options(tables: Sequence[LayerTable], most: int) -> list[list[int]]:
    """For every layer as many options, spread evenly over the logarithm of their errors, by increasing error.

    Of options of equal error one stands for all; those without an error are left out.

    Args:
        tables: Of the layers.
        most: Options of all layers together.

    Returns:
        None of any layer if `most` are too few for `LEAST_OPTIONS` of every layer that has so many.
    """
    differing = [sorted({o.error: i for i, o in enumerate(table.options) if o.error > 0}.items()) for table in tables]
    quota = largest = max(map(len, differing), default=0)
    while quota > 0 and sum(min(quota, len(own)) for own in differing) > most:
        quota -= 1
    if quota < min(LEAST_OPTIONS, largest):
        return [[] for _ in tables]
    return [[own[i][1] for i in _spread([error for error, _ in own], quota)] for own in differing]


def _spread(errors: Sequence[float], count: int) -> list[int]:
    """So many of some increasing errors, the first and the last among them, spread evenly over their logarithms."""
    left = list(range(len(errors)))
    logs = np.log(errors)
    while len(left) > count:
        gaps = [logs[left[i + 1]] - logs[left[i - 1]] for i in range(1, len(left) - 1)]
        del left[1 + int(np.argmin(gaps))]
    return left


_Rows = list[tuple[float, float | None]]


def _key(job: Job, tables: Tables, wanted: Sequence[Sequence[int]]) -> str:
    """What tells responses from others: the fits, the options that are asked for, and what outputs are compared on."""
    errors = [[f.table.options[i].error for i in own] for f, own in zip(tables.fitted, wanted, strict=True)]
    fits = sorted(path.name for path in tables.files)
    return digest([RESPONSE_VERSION, fits, errors, list(job.holdout), job.settings.search.divergence, SAMPLES])[:20]


def _read(path: Path) -> dict[str, _Rows]:
    """The responses in a file, by layer; none if it is damaged: they are measured anew then."""
    try:
        data = read_json(path) if path.exists() else {"layers": {}}
    except RunFolderError:
        return {}
    return {name: [(error, response) for error, response in rows] for name, rows in data["layers"].items()}


def _with(tables: Tables, found: Mapping[str, _Rows]) -> Tables:
    """The tables, and those of all options, with the responses of their layers."""
    names = [fitted.table.name for fitted in tables.fitted]
    largest = max((r for name in names for _, r in found[name] if r is not None), default=0.0)
    if largest <= 0:
        return tables
    told = {name: _checked(found[name], largest) for name in names}

    def own(table: LayerTable) -> LayerTable:
        return dataclasses.replace(table, responses=told[table.name])

    fitted = tuple(dataclasses.replace(f, table=own(f.table)) for f in tables.fitted)
    whole = tables.whole and dataclasses.replace(tables.whole, tables=tuple(map(own, tables.whole.tables)))
    return dataclasses.replace(tables, fitted=fitted, whole=whole)


def _checked(rows: _Rows, largest: float) -> tuple[tuple[float, float], ...]:
    """A layer's responses that can be made out; if there are none, the last as the least that could be."""
    least = LEAST_RESPONSE * largest
    known = [(error, BROKEN * largest if response is None else response) for error, response in rows]
    return tuple(row for row in known if row[1] > least) or tuple((error, least) for error, _ in known[-1:])
