"""A rival's network, trained and measured as this package's networks are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.rivals.methods import RIVALS
from benchmarks.runs import trained
from sekron_search.choice import judged, preferred
from sekron_search.costs.profile import Provenance
from sekron_search.costs.traced import NormStatistics, reestimate_batch_norm, traced_flops
from sekron_search.errors import ConfigError, DivergedError, InfeasibleBudgetError
from sekron_search.files import read_json, write_json
from sekron_search.job import Job
from sekron_search.model import copy_model
from sekron_search.progress import Reporter
from sekron_search.references import import_reference
from sekron_search.tensor_files import digest, write_tensors
from sekron_search.timing import Placed, network_latencies
from sekron_search.training_state import how_trained


@dataclass(frozen=True)
class Contest:
    """The conditions, which are the same for all.

    Args:
        job: The network, its data, the metrics, and how is trained: epochs, distillation, seed.
            What its settings say of budgets and of a search counts for nothing here.
        reporter: Told of the progress.
    """

    job: Job
    reporter: Reporter

    def enter(self, name: str, share: float, home: Path) -> dict[str, Any]:
        """What a rival reaches, from the folder if it is there.

        Args:
            name: Of `RIVALS`.
            share: Of the network's flops.
            home: Folder in which all that takes long is kept.
        """
        if self.job.distillation is None:
            raise ConfigError("rivals are compared after training: expected one epoch or more")
        result = home / "result.json"
        if not result.exists():
            home.mkdir(parents=True, exist_ok=True)
            try:
                found = self._result(self._compressed(name, share), home)
            except (InfeasibleBudgetError, DivergedError) as error:
                found = {"failed": str(error)}
            write_json(result, found)
        return dict(read_json(result))

    def _compressed(self, name: str, share: float) -> nn.Module:
        """The rival's network as training finds it."""
        rival, job = RIVALS[name], self.job
        assert job.factory is not None
        factory = import_reference(job.factory.reference, "model.factory")
        seed = job.settings.seed
        network = rival.network(job.model, job.example_inputs[0][:1], share, factory=factory, seed=seed)
        if not rival.afresh:
            # Statistics that keep the trained ones, as this package's networks have them; a network that lost channels
            # has no counterpart to each.
            paired = NormStatistics(job.model, job.calibration) if _same_norms(job.model, network) else None
            reestimate_batch_norm(network, job.calibration, original=paired)
        return network

    def _result(self, network: nn.Module, home: Path) -> dict[str, Any]:
        job, rate = self.job, home / "learning_rate.json"
        assert job.validate is not None
        assert job.test is not None
        untrained, start = job.validate(network), copy_model(network)
        assert job.distillation is not None
        curve = trained(job.distillation, network, job, home, self.reporter)
        networks, metrics = (network, start), (curve[-1]["metric"], untrained)
        marks = judged(job, networks, metrics, home / "judged.safetensors")
        kept = preferred(marks, job.settings.finetune.choice)  # as of this package's networks
        network = networks[kept]
        write_tensors(home / "weights.safetensors", dict(network.state_dict()))
        flops, whole = (traced_flops(net, job.example_inputs).total for net in (network, job.model))
        return {
            "flops": flops,
            "flops_ratio": flops / whole,
            "params": sum(p.numel() for p in network.parameters()),
            **speed(job, network),
            "validation_without_training": untrained,
            "validation": marks[kept].metric,
            "test": job.test(network),
            "learning_rate": read_json(rate) if rate.exists() else None,
            **how_trained(home / "checkpoint.pt"),
            "curve": curve,
        }


def conditions(job: Job) -> str:
    """A hash of all that a rival's result hangs on, but for the method and the flops."""
    told = job.fingerprint()
    settings = {name: told["settings"][name] for name in ("metric", "calibration", "latency", "seed")}
    settings["finetune"] = job.settings.finetune.model_dump(mode="json", exclude={"device"})
    return digest([settings, *(told[name] for name in ("model", "inputs", "source", "train"))])[:10]


def speed(job: Job, network: nn.Module) -> dict[str, Any]:
    """Latency of a network as it is deployed to the original's, each in the memory format that suits it best.

    Interleaved; with the processor, on which ratios depend.
    """
    placed: dict[str, Placed] = {
        f"{name}, {form}": (net, form)
        for name, net in (("original", job.model), ("compressed", network))
        for form in job.memory_formats
    }
    measured = network_latencies(job, placed)
    best = {
        name: min(measured[f"{name}, {form}"].median_ms for form in job.memory_formats)
        for name in ("original", "compressed")
    }
    return {"latency_ratio": best["compressed"] / best["original"], "processor": Provenance.here().processor}


def _same_norms(original: nn.Module, network: nn.Module) -> bool:
    """Whether batch-norms have the channels that they had."""
    kind = nn.modules.batchnorm._BatchNorm
    shapes = [[m.num_features for m in net.modules() if isinstance(m, kind)] for net in (original, network)]
    return shapes[0] == shapes[1]
