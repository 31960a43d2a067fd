"""Device profiles: what was measured on a device, and the latency model that predicts the rest. YAML on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from torch import nn

from sekron_search.costs.layers import Measurement, layer_key, measure_layers, traced_layer
from sekron_search.costs.measure import Latency
from sekron_search.costs.operations import Elementwise, Operation
from sekron_search.costs.predict import Hyperparameters, LatencyModel, Validation
from sekron_search.costs.provenance import Provenance
from sekron_search.costs.trace import Traced, traced_operations
from sekron_search.errors import ConfigError
from sekron_search.files import read_yaml
from sekron_search.model import Inputs
from sekron_search.runtimes.base import MemoryFormat, Runtime

__all__ = ["DeviceProfile", "Fitted", "Measurement", "Provenance", "layer_key"]

FORMAT = 2

#: What tells one machine from another.
MACHINE = ("machine", "processor")

#: What has to be the same for latencies to be comparable.
SETTINGS = ("runtime", "device", "memory_format", "num_threads")

#: Latencies of two profiles differ beyond noise where they are further apart than so many times their noise together.
CONFLICT = 3.0


@dataclass(frozen=True)
class Fitted:
    """What was computed from a profile's operations once, and is not computed again when it is loaded.

    Args:
        granularity: Multiple of channels at which time steps.
        node_ms: What every operation costs besides its own measured time.
        hyperparameters: Of the latency model.
        errors: Cross-validated, of every regime and of "all".
    """

    granularity: int
    node_ms: float
    hyperparameters: Hyperparameters
    errors: dict[str, Validation]


@dataclass
class DeviceProfile:
    """Latencies measured on one device, through one runtime, with one memory format and number of threads.

    Args:
        provenance: Where they were measured.
        operations: Of operations.
        layers: Exact ones of options of layers, by the key that `layer_key` gives.
        fuses_elementwise: Whether elementwise operations cost nothing in the runtime.
        fitted: The latency model's parameters; None as long as there is no model.
    """

    provenance: Provenance
    operations: dict[Operation, Latency] = field(default_factory=dict)
    layers: dict[str, Latency] = field(default_factory=dict)
    fuses_elementwise: bool = False
    fitted: Fitted | None = None
    _model: LatencyModel | None = field(default=None, repr=False, compare=False)
    _predicted: dict[str, Latency] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def empty(cls, runtime: Runtime) -> DeviceProfile:
        """A profile of this machine that holds nothing yet."""
        return cls(Provenance.here(runtime), fuses_elementwise=runtime.fuses_elementwise)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DeviceProfile:
        """Read a profile from YAML.

        Raises:
            ConfigError: If the file is missing, damaged or of another format; names file and key.
        """
        path = Path(path)
        data = read_yaml(path, f"device profile {path}")
        if data.get("format") != FORMAT:
            found = data.get("format")
            raise ConfigError(
                f"device profile {path}: expected key 'format' to be {FORMAT}, got {found!r}; measure it anew"
            )
        try:
            profile = cls(
                Provenance(**data["provenance"]),
                {Operation.parse(key): Latency(**value) for key, value in (data["operations"] or {}).items()},
                {str(key): Latency(**value) for key, value in (data["layers"] or {}).items()},
                bool(data["fuses_elementwise"]),
                None if data["model"] is None else _fitted(data["model"]),
            )
        except (AttributeError, ConfigError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"device profile {path}: {error}; expected keys 'provenance', 'fuses_elementwise', 'model', "
                "'operations' and 'layers', as `sekron-search profile` writes them"
            ) from None
        for name, held in (("operations", profile.operations), ("layers", profile.layers)):
            for key, latency in cast(dict[Any, Latency], held).items():
                for part, least in (("median_ms", 1e-9), ("noise_ms", 0), ("samples", 0)):
                    value = getattr(latency, part)
                    if not (isinstance(value, int | float) and least <= value < 1e9):
                        raise ConfigError(
                            f"device profile {path}: {name}[{str(key)!r}].{part} must be a number of at least "
                            f"{least:g}, got {value!r:.80}"
                        )
        return profile

    def to_yaml(self) -> str:
        """The profile as YAML text, what it is in a comment on top."""
        data = {
            "format": FORMAT,
            "provenance": asdict(self.provenance),
            "fuses_elementwise": self.fuses_elementwise,
            "model": None if self.fitted is None else asdict(self.fitted),
            "operations": {str(o): _rounded(latency) for o, latency in self.operations.items()},
            "layers": {key: _rounded(latency) for key, latency in sorted(self.layers.items())},
        }
        head = "# Device profile: milliseconds per call; noise is half the interquartile range of the samples.\n"
        return head + yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=1000)

    def check_usable(self, here: Provenance, *, force: bool = False) -> None:
        """Raise a `ConfigError` if the profile is of another runtime, device kind, memory format or thread count.

        Another machine is no reason: using the profile of a slower device is what profiles are for.

        Args:
            here: What latencies are wanted of.
            force: Use it all the same.
        """
        for key in SETTINGS:
            mine, wanted = getattr(self.provenance, key), getattr(here, key)
            if mine != wanted and not force:
                raise ConfigError(
                    f"device profile: it was measured with {key} = {mine!r}, this run uses {wanted!r}; "
                    f"measure one with `sekron-search profile`, set latency.{key} to match, or force its use"
                )

    def is_of(self, here: Provenance) -> bool:
        """Whether it is of this machine."""
        return all(getattr(self.provenance, key) == getattr(here, key) for key in MACHINE)

    def check_same_machine(self, here: Provenance, missing: int) -> None:
        """Raise a `ConfigError` if what the profile lacks would be measured on another machine than the rest."""
        for key in MACHINE:
            mine, wanted = getattr(self.provenance, key), getattr(here, key)
            if mine != wanted:
                raise ConfigError(
                    f"device profile: it lacks {missing} latencies and was measured with {key} = {mine!r}, this is "
                    f"{wanted!r}; measure it there with `sekron-search profile` and this configuration"
                )

    def missing(self, jobs: Sequence[Measurement], samples_per_batch: int) -> list[Measurement]:
        """The jobs whose exact latency the profile does not hold, each geometry once."""
        found = {layer_key(*job, samples_per_batch): job for job in jobs}
        return [job for key, job in found.items() if key not in self.layers]

    def measure(
        self,
        jobs: Sequence[Measurement],
        samples_per_batch: int,
        runtime: Runtime,
        *,
        rounds: int = 7,
        progress: Callable[[int, int], None] | None = None,
        after_group: Callable[[], None] | None = None,
    ) -> None:
        """Measure options of layers exactly.

        Args:
            jobs: (layer, structure, schedule, execution) to have latencies of.
            samples_per_batch: Batch size.
            runtime: That of the profile.
            rounds: Interleaved samples of each.
            progress: Called with (measured, total).
            after_group: Called whenever a group of jobs is measured, to save the profile.
        """
        done = 0

        def keep(found: dict[str, Latency]) -> None:
            nonlocal done
            self.layers.update(found)
            done += len(found)
            if progress is not None:
                progress(done, len(jobs))
            if after_group is not None:
                after_group()

        measure_layers(jobs, samples_per_batch, runtime, rounds=rounds, after_chunk=keep, known=dict(self.layers))

    def fit(self, granularity: int, node_ms: float) -> None:
        """Fit the latency model to the operations, and keep its parameters and errors."""
        self._model = LatencyModel(self.operations, granularity, node_ms=node_ms)
        self._predicted.clear()
        self.fitted = Fitted(granularity, node_ms, self._model.hyperparameters, self._model.validations)

    @property
    def model(self) -> LatencyModel:
        """The latency model.

        Raises:
            ConfigError: If the profile has none, for its operations were not measured, or not to the end.
        """
        if self.fitted is None:
            raise ConfigError(
                "device profile: it has no latency model, so it knows nothing but what was measured for a network; "
                "run `sekron-search profile` on the device, to the end"
            )
        if self._model is None:
            fitted = self.fitted
            known, node_ms = fitted.hyperparameters, fitted.node_ms
            self._model = LatencyModel(self.operations, fitted.granularity, known=known, node_ms=node_ms)
        return self._model

    def latency(self, job: Measurement, samples_per_batch: int) -> Latency:
        """Latency of an option of a layer: as measured, else predicted, which its `samples` of 0 says.

        Raises:
            ConfigError: If it has to be predicted and the profile has no model, or none of one of its operations.
        """
        return self.latencies([job], samples_per_batch)[0]

    def latencies(self, jobs: Sequence[Measurement], samples_per_batch: int) -> list[Latency]:
        """Latencies of many options; see `latency`."""
        keys = [layer_key(*job, samples_per_batch) for job in jobs]
        for key, job in dict(zip(keys, jobs, strict=True)).items():
            if key not in self.layers and key not in self._predicted:
                self._predicted[key] = self._prediction(job, samples_per_batch)
        return [self.layers.get(key) or self._predicted[key] for key in keys]

    def network_latency(self, network: nn.Module, inputs: Inputs) -> Latency:
        """A prediction for a whole network, as it is deployed and laid out; its `samples` are 0.

        Raises:
            ConfigError: If there is no model, or the network executes what it does not know.
        """
        return self._summed(traced_operations(network, inputs), "the network")

    def _prediction(self, job: Measurement, samples_per_batch: int) -> Latency:
        traced = traced_layer(job, samples_per_batch, cast(MemoryFormat, self.provenance.memory_format))
        return self._summed(traced, f"layer '{job[0].name}' with {job[1]}")

    def _summed(self, traced: Traced, what: str) -> Latency:
        if traced.unknown:
            raise ConfigError(
                f"device profile: {what} executes {', '.join(traced.unknown)}, which no latency model knows; measure "
                "on the device itself"
            )
        try:
            found = self.model.predict_sum(self.costly(traced.operations))
        except KeyError as error:
            raise ConfigError(
                f"device profile: {what} executes operations of the kind {error}, of which the profile has none; run "
                "`sekron-search profile` on the device, to the end"
            ) from None
        return Latency(found.ms, found.std_ms, 0)

    def costly(self, operations: Sequence[Operation]) -> list[Operation]:
        """Those that take time in the profile's runtime."""
        return [o for o in operations if not (self.fuses_elementwise and isinstance(o, Elementwise))]

    def merge(self, other: DeviceProfile) -> tuple[DeviceProfile, list[str]]:
        """Both profiles in one, the newer one's latencies where both have them.

        The latency model is dropped where the other one brings operations: it is to be fitted anew.

        Returns:
            The profile, and a line for every latency that differs beyond its noise.

        Raises:
            ConfigError: If they are of different devices or settings.
        """
        for key in (*MACHINE, *SETTINGS):
            mine, theirs = getattr(self.provenance, key), getattr(other.provenance, key)
            if mine != theirs:
                raise ConfigError(
                    f"device profiles: they cannot be merged, one has {key} = {mine!r}, the other {theirs!r}"
                )
        old, new = sorted((self, other), key=lambda profile: profile.provenance.date)
        conflicts = _conflicts(old.operations, new.operations) + _conflicts(old.layers, new.layers)
        operations, layers = {**old.operations, **new.operations}, {**old.layers, **new.layers}
        # Exact latencies of layers leave a model as it is; other operations make another one.
        fitted = next((p.fitted for p in (new, old) if p.operations == operations), None)
        fuses = self.fuses_elementwise or other.fuses_elementwise
        merged = DeviceProfile(new.provenance, operations, layers, fuses, fitted)
        return merged, conflicts


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _conflicts(old: dict[Any, Latency], new: dict[Any, Latency]) -> list[str]:
    return [
        f"{key}: {old[key].median_ms:.4g} ms before, {new[key].median_ms:.4g} ms now"
        for key in old.keys() & new.keys()
        if abs(old[key].median_ms - new[key].median_ms) > CONFLICT * (old[key].noise_ms + new[key].noise_ms)
    ]


def _fitted(data: dict[str, Any]) -> Fitted:
    errors = {str(name): _validation(values) for name, values in data["errors"].items()}
    kernels, inflation = (data["hyperparameters"][name].items() for name in ("log_kernel", "inflation"))
    known = Hyperparameters(
        {str(name): [_finite(value) for value in values] for name, values in kernels},
        {str(name): _finite(value) for name, value in inflation},
    )
    return Fitted(int(data["granularity"]), _finite(data["node_ms"]), known, errors)


def _validation(data: dict[str, Any]) -> Validation:
    errors = {name: _finite(value) for name, value in data.items() if name != "operations"}
    return Validation(**errors, operations=int(data["operations"]))


def _finite(value: Any) -> float:
    """A number of a file.

    Raises:
        ValueError: If it is none, or not finite.
    """
    if not (isinstance(value, int | float) and math.isfinite(value)):
        raise ValueError(f"model: expected a finite number, got {value!r:.80}")
    return float(value)


def _rounded(latency: Latency) -> dict[str, Any]:
    return {
        "median_ms": float(f"{latency.median_ms:.5g}"),
        "noise_ms": float(f"{latency.noise_ms:.3g}"),
        "samples": latency.samples,
    }
