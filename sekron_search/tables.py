"""From a network to tables: for each layer the options, fitted and scored, cached by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sekron_search.costs.analytic import layer_cost
from sekron_search.errors import SekronError
from sekron_search.files import read_json, write_json
from sekron_search.kron.families import dense, family
from sekron_search.kron.layer import Execution
from sekron_search.kron.metric import InputMetric
from sekron_search.kron.projection import reconstruct_batch
from sekron_search.kron.refine import Refiner
from sekron_search.kron.structure import Structure
from sekron_search.model import LayerInfo
from sekron_search.scoring import CandidateStructure, candidates, scores, shortlist
from sekron_search.search.budget import CostName
from sekron_search.search.options import LayerTable, Option
from sekron_search.search.pareto import non_dominated
from sekron_search.search.space import SearchSpace
from sekron_search.tensor_files import read_tensors, write_tensors

#: Raised whenever a change makes earlier tables wrong.
TABLE_VERSION = 13


@dataclass(frozen=True)
class FittedLayer:
    """A layer's table, and the factors and output shifts of its options.

    Args:
        table: The options.
        factors: Per option, tensors (G, rank indices, f, c, h, w) in float32; none for the original.
        shifts: Per option, the mean error of every out-channel on calibration data; a bias can take it up.
    """

    table: LayerTable
    factors: tuple[tuple[Tensor, ...], ...]
    shifts: tuple[Tensor | None, ...]

    def kept(self, keep: Sequence[bool]) -> FittedLayer:
        """Only some of the options; the first, the original, always stays."""
        chosen = [i for i, wanted in enumerate(keep) if i == 0 or wanted]
        return FittedLayer(
            replace(self.table, options=tuple(self.table.options[i] for i in chosen)),
            tuple(self.factors[i] for i in chosen),
            tuple(self.shifts[i] for i in chosen),
        )

    def pruned(self, costs: Sequence[CostName]) -> FittedLayer:
        """Only the options that no other one beats on these costs and the error; the first always stays."""
        options = self.table.options
        return self.kept(non_dominated([[o.error, *(o.cost(name) for name in costs)] for o in options]).tolist())

    def faster(self) -> FittedLayer:
        """Only the options that are faster than the original, beyond the noise of the measurements."""
        original = self.table.options[0]
        return self.kept([o.is_faster(original) for o in self.table.options])

    def not_slower(self) -> FittedLayer:
        """Less the options that are slower than the original, beyond the noise of the measurements."""
        original = self.table.options[0]
        return self.kept([not original.is_faster(o) for o in self.table.options])


def all_options(info: LayerInfo, space: SearchSpace, bytes_per_sample: int) -> list[Option]:
    """The original and every option of the space, without errors: nothing is fitted."""
    rows = [_dense_option(info, bytes_per_sample)]
    for candidate in candidates(info, space):
        rows += _options(candidate, info, space, bytes_per_sample, float("nan"), float("nan"))
    return rows


def cheapest_table(info: LayerInfo, space: SearchSpace, bytes_per_sample: int) -> LayerTable:
    """A table of costs without errors, for asking what is reachable before anything is fitted."""
    rows = all_options(info, space, bytes_per_sample)
    values = np.array([[o.flops, o.params, o.peak_bytes] for o in rows], dtype=float)
    mask = non_dominated(values)
    return LayerTable(info.name, tuple(o for i, o in enumerate(rows) if i == 0 or mask[i]))


def build_layer_table(
    info: LayerInfo, weight: Tensor, metric: InputMetric, space: SearchSpace, *, bytes_per_sample: int, steps: int
) -> FittedLayer:
    """Score the structures of the space on the weight, refine the best on calibration data, keep the non-dominated.

    Args:
        info: The layer.
        weight: (G, F, C, *kernel).
        metric: Of the layer's calibration inputs.
        space: Which structures.
        bytes_per_sample: Bytes of one element times the batch size, for peak memory.
        steps: Refinement steps per structure.
    """
    exact = weight.double()
    pool = candidates(info, space)
    errors = scores(pool, exact, space.max_fits)
    chosen = shortlist(pool, errors, space.max_options)
    options = [_dense_option(info, bytes_per_sample)]
    factors: list[tuple[Tensor, ...]] = [()]
    shifts: list[Tensor | None] = [None]
    fitted: list[tuple[Option, tuple[Tensor, ...], Tensor | None]] = []
    refiner = Refiner(exact, metric)
    for index in sorted(chosen, key=lambda i: pool[i].structure.shapes):  # neighbours share what is whitened
        candidate = pool[index]
        fit = refiner.fit(candidate.structure, steps=steps)
        rebuilt = reconstruct_batch(candidate.structure, fit.factors)[:, : exact.shape[1], : exact.shape[2]]
        weight_error = float((rebuilt - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny))
        shift = ((exact - rebuilt).flatten(2) @ metric.mean[:, :, None].to(exact)).flatten().float()
        stored = tuple(a.float() for a in fit.factors)
        for option in _options(candidate, info, space, bytes_per_sample, weight_error, fit.rel_error):
            fitted.append((option, stored, shift))
    values = [[o.error, o.flops, o.params, o.peak_bytes] for o, _, _ in fitted]
    for keep, row in zip(non_dominated(values) if values else [], fitted, strict=True):
        if keep:
            options.append(row[0])
            factors.append(row[1])
            shifts.append(row[2])
    table = LayerTable(info.name, tuple(options), sensitivity=_sensitivity(info, exact, metric))
    return FittedLayer(table, tuple(factors), tuple(shifts))


def table_key(info: LayerInfo, space: SearchSpace, context: str, *, bytes_per_sample: int, steps: int) -> str:
    """Hash of everything a layer's table depends on.

    Args:
        info: The layer.
        space: Which structures.
        context: Hash of the network and its calibration inputs. The moments themselves are no key: their last digits
            change with the number of threads.
        bytes_per_sample, steps: As for `build_layer_table`.
    """
    relevant = space.model_dump(exclude={"include", "exclude", "name"}, mode="json")
    parts = [TABLE_VERSION, repr(info), relevant, context, bytes_per_sample, steps]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def load_table(folder: Path, key: str, name: str) -> FittedLayer | None:
    """A cached table; None if there is none or it cannot be read (it is then built anew)."""
    records, weights = table_files(folder, key)
    try:
        data = read_json(records)
        tensors = read_tensors(weights)
        options = tuple(Option.from_json(o) for o in data["options"])
        sensitivity = None if data["sensitivity"] is None else float(data["sensitivity"])
        factors = tuple(
            tuple(tensors[f"{i}.factor{k}"] for k in range(Structure.parse(o.structure).num_factors))
            if not o.is_original
            else ()
            for i, o in enumerate(options)
        )
        shifts = tuple(tensors.get(f"{i}.shift") for i in range(len(options)))
    except (OSError, ValueError, KeyError, TypeError, SekronError):
        return None
    return FittedLayer(LayerTable(name, options, sensitivity=sensitivity), factors, shifts)


def table_files(folder: Path, key: str) -> tuple[Path, Path]:
    """The files of a cached table."""
    return folder / f"{key}.json", folder / f"{key}.safetensors"


def save_table(folder: Path, key: str, fitted: FittedLayer) -> None:
    """Write a table to the cache; the JSON comes last, so a table that can be seen is complete."""
    tensors = {f"{i}.factor{k}": a for i, factors in enumerate(fitted.factors) for k, a in enumerate(factors)}
    tensors |= {f"{i}.shift": shift for i, shift in enumerate(fitted.shifts) if shift is not None}
    records, weights = table_files(folder, key)
    write_tensors(weights, tensors)
    options = [asdict(o) for o in fitted.table.options]
    write_json(records, {"options": options, "sensitivity": fitted.table.sensitivity})


def _sensitivity(info: LayerInfo, weight: Tensor, metric: InputMetric) -> float | None:
    """The square root of what the divergence would be, by the curvature, if the layer gave nothing; None if unknown.

    The root, for the curvature is that of the original and counts errors of layers as independent: halfway between
    equal weights and it, the knapsack's solutions come out better than with either.
    """
    if metric.curvature is None:
        return None
    positions = layer_cost(dense(info.weight_shape), info).flops / weight.numel()
    vanished: float = float(metric.norm(weight)) * positions**0.5
    return max(vanished, float(torch.finfo(torch.float64).tiny))


def _dense_option(info: LayerInfo, bytes_per_sample: int) -> Option:
    cost = layer_cost(dense(info.weight_shape), info)
    peak = cost.peak_elements * bytes_per_sample
    text = str(dense(info.weight_shape))
    return Option(text, "dense", "0", "factored", cost.flops, cost.params, peak, weight_error=0.0, error=0.0)


def _options(
    candidate: CandidateStructure,
    info: LayerInfo,
    space: SearchSpace,
    bytes_per_sample: int,
    weight_error: float,
    error: float,
) -> list[Option]:
    """The executions of a structure that are worth having."""
    executions: list[Execution] = ["factored", "dense"] if space.dense_execution else ["factored"]
    whole = layer_cost(dense(info.weight_shape), info)
    options = []
    for execution in executions:
        cost = layer_cost(candidate.structure, info, execution)
        if execution == "factored" and cost.flops >= whole.flops:
            continue
        options.append(
            Option(
                str(candidate.structure),
                family(candidate.structure),
                str(cost.schedule),
                execution,
                cost.flops,
                cost.params,
                cost.peak_elements * bytes_per_sample,
                weight_error,
                error,
            )
        )
    return options
