"""Options of a layer, tables of options, assignments of one option per layer, and what an assignment costs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sekron_search.search.budget import COST_NAMES, CostName

Assignment = tuple[int, ...]
Execution = Literal["factored", "dense"]


@dataclass(frozen=True)
class Option:
    """One way to run a layer.

    Args:
        structure: Text form of the structure of one group's weight.
        family: Its usual name.
        schedule: How the factors run, as text.
        execution: "factored" or "dense".
        flops: Per sample.
        params: Of the weight, all groups; the bias is not part of an option.
        peak_bytes: Working set of the layer on the example batch.
        weight_error: Relative error of the weight.
        error: Relative error of the layer's output on calibration inputs.
        latency_ms: On the example batch; None where latency is neither budgeted nor measured.
        latency_noise_ms: Half the spread of the measurement.
    """

    structure: str
    family: str
    schedule: str
    execution: Execution
    flops: int
    params: int
    peak_bytes: int
    weight_error: float
    error: float
    latency_ms: float | None = None
    latency_noise_ms: float | None = None

    @property
    def is_original(self) -> bool:
        """Whether the layer is left as it is."""
        return self.family == "dense"

    def is_faster(self, other: Option) -> bool:
        """Whether it takes less time than another option, beyond the noise of both."""
        noise = (self.latency_noise_ms or 0.0) + (other.latency_noise_ms or 0.0)
        return self.cost("latency_ms") + noise < other.cost("latency_ms")

    def cost(self, name: CostName) -> float:
        """The layer's cost of that name."""
        values = {
            "flops": self.flops,
            "params": self.params,
            "latency_ms": self.latency_ms,
            "peak_activation_bytes": self.peak_bytes,
        }
        value = values[name]
        if value is None:
            raise ValueError(f"option {self.structure}: {name} was not measured")
        return float(value)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Option:
        """Inverse of `dataclasses.asdict`."""
        return cls(**data)


@dataclass(frozen=True)
class LayerTable:
    """The options of a layer; the first leaves it as it is.

    Args:
        name: The layer.
        options: Its options.
        outside_bytes: What is alive besides the layer's working set while it runs, on the example batch.
        sensitivity: What a squared relative error of the layer's output counts, compared with other layers; None if
            that is unknown.
        responses: Of some of the options, by increasing error: the relative error of the layer's output, above 0, and
            the divergence of the network in which that option alone is not the original, above 0 too.
    """

    name: str
    options: tuple[Option, ...]
    outside_bytes: int = 0
    sensitivity: float | None = None
    responses: tuple[tuple[float, float], ...] = ()

    @property
    def errors(self) -> NDArray[np.float64]:
        """The relative error of the layer's output with every option."""
        return np.array([option.error for option in self.options])

    def response_to(self, errors: NDArray[np.float64]) -> NDArray[np.float64]:
        """The divergence with this layer alone at some relative errors of its output, by the responses measured.

        Straight lines between them in logarithms; outside, it goes as the squared error. Without responses all errors
        have to be 0.
        """
        if not self.responses:
            return np.zeros_like(errors)
        known, found = np.log(np.array(self.responses).T)
        wanted = np.log(np.maximum(errors, np.finfo(float).tiny))
        inside = np.clip(wanted, known[0], known[-1])
        return np.where(errors > 0, np.exp(np.interp(inside, known, found) + 2 * (wanted - inside)), 0.0)


@dataclass(frozen=True)
class Network:
    """The tables of all layers, and the costs of what is not replaced.

    Args:
        tables: One per replaceable layer.
        original: Costs of the original network, of which budgets are multiples.
        peak_floor_bytes: Peak of the parts of the network that no option changes.
        latency_scale: What the network gains for a millisecond that its layers gain each on its own, as calibrated
            against whole networks.
        latency_drift: What the original takes in the memory format of the tables, relative to its own.
    """

    tables: tuple[LayerTable, ...]
    original: Mapping[str, float]
    peak_floor_bytes: float = 0.0
    latency_scale: float = 1.0
    latency_drift: float = 1.0

    def fixed(self, name: CostName) -> float:
        """Cost of everything but the layers' weights: the whole with no layer replaced, less these layers."""
        return self.unchanged(name) - sum(float(values[0]) for values in self.values(name))

    def unchanged(self, name: CostName) -> float:
        """Cost of the network with every layer left as it is, in the memory format of the tables."""
        return self.original[name] * (self.latency_drift if name == "latency_ms" else 1.0)

    def values(self, name: CostName) -> list[NDArray[np.float64]]:
        """The cost of every option of every layer."""
        scale = self.latency_scale if name == "latency_ms" else 1.0
        return [scale * np.array([o.cost(name) for o in t.options]) for t in self.tables]

    def cost(self, assignment: Assignment, name: CostName) -> float:
        """A cost of the whole network: sums, but for the peak, which is the largest working set."""
        options = self.chosen(assignment)
        if name == "peak_activation_bytes":
            peaks = (t.outside_bytes + o.peak_bytes for t, o in zip(self.tables, options, strict=True))
            return max(self.peak_floor_bytes, *peaks)
        return self.fixed(name) + sum(float(v[i]) for v, i in zip(self.values(name), assignment, strict=True))

    def costs(self, assignment: Assignment) -> dict[CostName, float]:
        """Every cost of the whole network that is known."""
        known = [n for n in COST_NAMES if n != "latency_ms" or self.has_latency]
        return {name: self.cost(assignment, name) for name in known}

    @property
    def has_latency(self) -> bool:
        """Whether every option has a latency."""
        return "latency_ms" in self.original and all(
            option.latency_ms is not None for table in self.tables for option in table.options
        )

    def chosen(self, assignment: Assignment) -> tuple[Option, ...]:
        """The option of every layer."""
        return tuple(table.options[i] for table, i in zip(self.tables, assignment, strict=True))

    def digest(self, assignment: Assignment) -> str:
        """Short name of an assignment's network, after what its layers become."""
        structures = [(o.structure, o.schedule, o.execution) for o in self.chosen(assignment)]
        return hashlib.sha256(repr(structures).encode()).hexdigest()[:10]
