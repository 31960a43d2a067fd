"""What a run is asked to do: network, data, metrics and settings, wherever they came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sekron_search.config import Settings
from sekron_search.costs.profile import DeviceProfile, Provenance
from sekron_search.curvature import output_curvature
from sekron_search.data import SplitMetric
from sekron_search.divergence import reference_outputs
from sekron_search.errors import ConfigError, DataError, users_own
from sekron_search.export import Factory, factory_json
from sekron_search.finetune import Distillation
from sekron_search.inspection import inspect_model
from sekron_search.model import Inputs, batch_size, copy_model
from sekron_search.precision import is_there
from sekron_search.runtimes.base import MemoryFormat, Runtime
from sekron_search.runtimes.registry import make_runtime, runtime_class
from sekron_search.sections import FinetuneConfig
from sekron_search.tensor_files import digest
from sekron_search.training_data import TrainingData
from sekron_search.training_state import Measure

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Job:
    """Everything a run needs.

    Args:
        model: The trained network; never changed.
        example_inputs: The batch on which latency and peak memory are meant.
        calibration: Inputs on which layers are fitted.
        holdout: Other inputs, on which the divergence is measured.
        settings: What to do.
        validate: Metric for choosing, higher is better.
        test: Metric for the report, on data that nothing before has seen.
        train: For fine-tuning.
        factory: How the architecture is built, for the artefact.
        source: What the model and the data are, for the run folder's identity.
    """

    model: nn.Module
    example_inputs: Inputs
    calibration: Sequence[Inputs]
    holdout: Sequence[Inputs]
    settings: Settings
    validate: Metric | None = None
    test: Metric | None = None
    train: TrainingData | None = None
    factory: Factory | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return torch.device(self.settings.device)

    @property
    def memory_formats(self) -> tuple[MemoryFormat, ...]:
        """What is asked for, or all that the runtime takes, where that is left open."""
        asked = self.settings.latency.memory_format
        return runtime_class(self.settings.latency.runtime).memory_formats if asked == "auto" else (asked,)

    def runtime(self, memory_format: MemoryFormat) -> Runtime:
        """What runs the network in the end, and measures it."""
        latency = self.settings.latency
        # A network that is fitted on a GPU can be deployed to a runtime for CPUs.
        runs_there = self.device.type in runtime_class(latency.runtime).device_types
        return make_runtime(
            latency.runtime,
            num_threads=latency.num_threads,
            device=self.device if runs_there else "cpu",
            memory_format=memory_format,
        )

    @cached_property
    def profile(self) -> DeviceProfile | None:
        """The device profile that the settings name, where latency is budgeted.

        Raises:
            ConfigError: If it cannot be read, or is of another runtime, memory format or number of threads.
        """
        path = self.settings.latency.profile
        if path is None or "latency_ms" not in self.settings.bounds.names:
            return None
        profile = DeviceProfile.load(path)
        fitting = [f for f in self.memory_formats if f == profile.provenance.memory_format]
        here = Provenance.here(self.runtime((fitting or list(self.memory_formats))[0]))
        profile.check_usable(here, force=self.settings.latency.any_profile)
        return profile

    @cached_property
    def elsewhere(self) -> DeviceProfile | None:
        """The profile if it is of another machine: latencies are then predicted for that one, and none measured here.

        Raises:
            ConfigError: If it has no latency model.
        """
        if self.profile is None or self.profile.is_of(Provenance.here(self.runtime(self.memory_formats[0]))):
            return None
        assert self.profile.model is not None
        return self.profile

    @property
    def batch(self) -> int:
        """Samples of the example batch."""
        return batch_size(self.example_inputs)

    @property
    def bytes_per_sample(self) -> int:
        """Bytes of one element of an activation, over the samples of the example batch."""
        return next(self.model.parameters()).element_size() * self.batch

    @cached_property
    def model_digest(self) -> str:
        """Hash of the network: its architecture as it prints, weights and buffers."""
        return digest([str(self.model), list(self.model.state_dict().items())])

    @cached_property
    def references(self) -> list[Any]:
        """The network's outputs on the held-out inputs, checked to be finite."""
        return reference_outputs(self.model, self.holdout)

    @cached_property
    def curvature(self) -> dict[str, Tensor]:
        """How much errors of the outputs of layers matter, by layer; empty where that is not asked for."""
        if not self.settings.calibration.curvature:
            return {}
        layers = inspect_model(self.model, self.example_inputs).layers
        classes = self.settings.search.divergence == "kl"
        return output_curvature(self.model, layers, self.calibration, classes=classes, seed=self.settings.seed)

    @property
    def trains(self) -> bool:
        """Whether candidates are trained."""
        return self.train is not None and self.settings.finetune.epochs > 0

    @property
    def distillation(self) -> Distillation | None:
        """How candidates are trained, if they are."""
        return self.distillation_by(self.settings.finetune) if self.trains else None

    @cached_property
    def teacher(self) -> nn.Module:
        """The network, where candidates are trained.

        Raises:
            ConfigError: If that device is not there.
        """
        device = torch.device(self.settings.finetune.device or self.device)
        if not is_there(device):
            raise ConfigError(
                f"config key 'finetune.device': torch sees no CUDA device here, got '{device}'; go on where there is "
                "one, or train on the CPU: --set finetune.device=cpu"
            )
        here = device.type == self.device.type and device.index in (None, self.device.index)
        return self.model if here else copy_model(self.model).to(device)

    @property
    def measure_in_training(self) -> Measure | None:
        """`validate`, of a network where it is trained: a function of the user's gets it where the run is."""
        validate = self.validate
        if validate is None:
            return None
        if isinstance(validate, SplitMetric) or self.teacher is self.model:
            return lambda network: {"metric": validate(network)}
        return lambda network: {"metric": validate(copy_model(network).to(self.device))}

    def distillation_by(self, config: FinetuneConfig) -> Distillation:
        """How a candidate is trained by another configuration than the run's.

        Raises:
            DataError: If there is no data for training.
        """
        if self.train is None:
            raise DataError("train: there is no data for training; give some")
        return Distillation(self.teacher, self.train, config, self.settings.search.divergence)

    def fingerprint(self) -> dict[str, Any]:
        """What makes this run another one than the next: a folder is gone on with only by the same."""
        profile = self.settings.latency.profile
        # How long the search may take is no part of what the run is; one that was ended by it stays ended. Nor is where
        # files lie, and where is trained, so that a run and its tables can be moved.
        settings = self.settings.model_dump(
            mode="json",
            exclude={"search": {"time_limit_s"}, "finetune": {"device"}, "tables": True, "out": True},
        )
        if not self.source:
            settings["metric"] = "accuracy"  # of a metric that is given as a function this is the name, for reports
        return {
            "settings": settings,
            "model": self.model_digest,
            "inputs": digest([self.example_inputs, list(self.calibration), list(self.holdout)]),
            "source": dict(self.source),
            "factory": factory_json(self.factory),
            "profile": profile.read_text() if profile is not None and profile.exists() else None,
            "train": None if self.train is None else len(self.train),
            "metrics": [self.validate is not None, self.test is not None],
        }


def checked_metric(metric: Metric, name: str) -> Metric:
    """A metric of the user's, as a finite Python number.

    Args:
        metric: Takes a network.
        name: For messages.
    """

    if not callable(metric):
        raise DataError(f"{name}: expected a function of a network that returns a number, got {type(metric).__name__}")

    def call(network: nn.Module) -> float:
        network.eval()
        with users_own(f"{name}: it failed"), torch.no_grad():
            value = metric(network)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(f"{name}: expected a function that returns a number, got {value!r:.80}") from None
        if not math.isfinite(number):
            raise DataError(f"{name}: it returned {number}; expected a finite number, higher is better")
        return number

    return call
