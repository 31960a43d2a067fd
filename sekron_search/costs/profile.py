"""Device profiles: measured latencies of layers with their noise, and where they come from. YAML on disk."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch import device as TorchDevice

from sekron_search.costs.measure import Latency, measure_callables
from sekron_search.errors import ConfigError
from sekron_search.files import read_yaml
from sekron_search.kron.dense import AXES, KINDS
from sekron_search.kron.layer import Execution
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from sekron_search.model import REPLACEMENTS, LayerInfo
from sekron_search.runtimes.base import threads

FORMAT = 1
RUNTIME = "pytorch-eager"

#: What a latency is of: layer, structure, schedule of the factors, execution.
Measurement = tuple[LayerInfo, Structure, Schedule, Execution]


@dataclass(frozen=True)
class Provenance:
    """Where a profile was measured."""

    machine: str
    processor: str
    device: str
    runtime: str
    num_threads: int
    torch: str
    date: str

    @classmethod
    def here(cls, device: TorchDevice | str = "cpu", num_threads: int | None = None) -> Provenance:
        """This machine, now."""
        kind = torch.device(device)
        name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else _processor()
        return cls(
            machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            processor=name,
            device=kind.type,
            runtime=RUNTIME,
            num_threads=num_threads or torch.get_num_threads(),
            torch=str(torch.__version__),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )


@dataclass
class DeviceProfile:
    """Latencies measured on one device, through one runtime, with one number of threads.

    Args:
        provenance: Where they were measured.
        latencies: By the key that `layer_key` gives.
    """

    provenance: Provenance
    latencies: dict[str, Latency] = field(default_factory=dict)

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
            provenance = Provenance(**data["provenance"])
            latencies = {str(key): Latency(**value) for key, value in dict(data["latencies"] or {}).items()}
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"device profile {path}: {error}; expected keys 'provenance' and 'latencies'") from None
        medians = {key: latency.median_ms for key, latency in latencies.items()}
        if bad := [k for k, v in medians.items() if not (isinstance(v, int | float) and 0 < v < 1e9)]:
            raise ConfigError(f"device profile {path}: latencies[{bad[0]!r}].median_ms must be a positive number")
        return cls(provenance, latencies)

    def to_yaml(self) -> str:
        """The profile as YAML text, what it is in a comment on top."""
        data = {
            "format": FORMAT,
            "provenance": asdict(self.provenance),
            "latencies": {key: _rounded(value) for key, value in sorted(self.latencies.items())},
        }
        head = "# Device profile: milliseconds per call; noise is half the interquartile range of the samples.\n"
        return head + yaml.safe_dump(data, sort_keys=False, width=1000)

    def check_usable(self, here: Provenance) -> None:
        """Raise a `ConfigError` if the profile is of another runtime, device kind or number of threads."""
        for key in ("runtime", "device", "num_threads"):
            mine, wanted = getattr(self.provenance, key), getattr(here, key)
            if mine != wanted:
                raise ConfigError(
                    f"device profile: it was measured with {key} = {mine!r}, this run uses {wanted!r}; "
                    f"measure one with `sekron-search profile`, or set latency.{key} to match"
                )

    def check_same_machine(self, here: Provenance, missing: int) -> None:
        """Raise a `ConfigError` if what the profile lacks would be measured on another machine than the rest."""
        for key in ("machine", "processor"):
            mine, wanted = getattr(self.provenance, key), getattr(here, key)
            if mine != wanted:
                raise ConfigError(
                    f"device profile: it lacks {missing} latencies and was measured with {key} = {mine!r}, this is "
                    f"{wanted!r}; measure it there with `sekron-search profile` and this configuration"
                )

    def missing(self, jobs: Sequence[Measurement], samples_per_batch: int) -> list[Measurement]:
        """The jobs whose latency the profile does not hold yet, each geometry once."""
        found = {layer_key(*job, samples_per_batch): job for job in jobs}
        return [job for key, job in found.items() if key not in self.latencies]

    def measure(
        self,
        jobs: Sequence[Measurement],
        samples_per_batch: int,
        *,
        rounds: int = 7,
        progress: Callable[[int, int], None] | None = None,
        after_group: Callable[[], None] | None = None,
    ) -> None:
        """Measure layers; those of equal geometry are timed one beside the other.

        Args:
            jobs: (layer, structure, schedule, execution) to have latencies of.
            samples_per_batch: Batch size.
            rounds: Interleaved samples of each.
            progress: Called with (measured, total).
            after_group: Called whenever a group of jobs is measured, to save the profile.
        """
        device = torch.device(self.provenance.device)
        groups: dict[str, dict[str, Measurement]] = {}
        for job in jobs:
            groups.setdefault(geometry_key(job[0], samples_per_batch), {})[layer_key(*job, samples_per_batch)] = job
        total = sum(len(group) for group in groups.values())
        done = 0
        for group in groups.values():
            info = next(iter(group.values()))[0]
            x = _random_input(info, samples_per_batch, device)
            # A handful at a time: interleaving needs neighbours in time, not all of them in memory.
            keys = list(group)
            for start in range(0, len(keys), 16):
                chunk = keys[start : start + 16]
                calls = {key: _call(_random_layer(*group[key]).to(device), x) for key in chunk}
                with threads(self.provenance.num_threads):
                    self.latencies.update(measure_callables(calls, rounds=rounds, device=device))
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            if after_group is not None:
                after_group()


def geometry_key(info: LayerInfo, samples_per_batch: int) -> str:
    """Text that is equal for layers that take the same time with the same structure."""
    geometry = info.geometry
    batch = samples_per_batch * info.positions_per_sample
    if info.kind == "linear":
        return f"linear rows={batch} {info.in_channels}->{info.out_channels}"
    kernel = "x".join(map(str, info.weight_shape[2:]))
    size = "x".join(map(str, info.input_size))
    return (
        f"{info.kind} batch={batch} {info.in_channels}->{info.out_channels} at {size} kernel={kernel} "
        f"stride={geometry.stride} padding={geometry.padding} dilation={geometry.dilation} groups={geometry.groups}"
    )


def layer_key(
    info: LayerInfo, structure: Structure, schedule: Schedule, execution: Execution, samples_per_batch: int
) -> str:
    """Key of a latency in a profile."""
    how = "dense" if structure.is_dense or execution == "dense" else f"{structure} schedule={schedule}"
    return f"{geometry_key(info, samples_per_batch)} | {how}"


def _call(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: layer(x)


def _random_input(info: LayerInfo, samples: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = info.input_size
    if info.geometry.transposed:
        size = info.geometry.output_size(size, info.weight_shape[2:])
    shape = (samples * info.positions_per_sample, info.in_channels, *size[: AXES[info.kind]])
    return torch.randn(shape, generator=generator).to(device)


def _random_layer(info: LayerInfo, structure: Structure, schedule: Schedule, execution: Execution) -> nn.Module:
    if structure.is_dense:
        return _dense_layer(info, "cpu").eval()
    dense: Any = _dense_layer(info, "meta")
    return REPLACEMENTS[type(dense)](dense, structure, schedule=schedule, execution=execution).eval()


def _dense_layer(info: LayerInfo, device: str) -> nn.Module:
    """A dense layer of that geometry, without a bias."""
    geometry, kernel = info.geometry, info.weight_shape[2:]
    options: dict[str, Any] = {"bias": False, "device": device}
    if info.kind != "linear":
        axes = slice(AXES[info.kind])
        even = all(before == after for before, after in geometry.padding)
        options |= {
            "kernel_size": kernel[axes],
            "stride": geometry.stride[axes],
            "padding": tuple(before for before, _ in geometry.padding)[axes] if even else "same",
            "dilation": geometry.dilation[axes],
            "groups": geometry.groups,
        }
        if geometry.transposed:
            options["output_padding"] = geometry.unread(info.input_size, kernel)[axes]
    return KINDS[info.kind](info.in_channels, info.out_channels, **options)


def _rounded(latency: Latency) -> dict[str, Any]:
    return {
        "median_ms": float(f"{latency.median_ms:.5g}"),
        "noise_ms": float(f"{latency.noise_ms:.3g}"),
        "samples": latency.samples,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
