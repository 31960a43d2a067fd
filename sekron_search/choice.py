"""Which of several networks is best, also where their metrics do not tell."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sekron_search.data import SplitMetric, batches, to_device, values_of_samples
from sekron_search.divergence import ChosenBy, divergence
from sekron_search.job import Job
from sekron_search.mirrored import mean_with_mirrored
from sekron_search.model import batch_size, device_of, run_model
from sekron_search.tensor_files import read_tensors, write_tensors

#: A metric is told apart from the best one if it is lower by more than so many standard errors of their difference.
STANDARD_ERRORS = 1.96


@dataclass(frozen=True, eq=False)
class Judged:
    """How good a network is on the validation data; without a metric, how near to the original on the hold-out.

    Args:
        metric: Of all samples; None if there is none.
        values: (N,), the metric of every sample, of which it is the mean; None where that is not known.
        divergence: Mean divergence of the outputs on the samples from those wanted: the original's, or where the
            teacher is mirrored, what it is trained to give. NaN where it is not known.
    """

    metric: float | None
    values: Tensor | None = None
    divergence: float = math.nan


def judged(job: Job, networks: Sequence[nn.Module], metrics: Sequence[float | None], path: Path) -> list[Judged]:
    """How good networks are, measured once where the validation metric is one by name, or there is none.

    A function of the user's says nothing of its samples: then the metrics are all.

    Args:
        job: The original, and the validation metric; the hold-out, if there is none.
        networks: They and the original end in evaluation mode.
        metrics: Theirs, as they were measured before.
        path: Where what is measured is kept.
    """
    if job.validate is not None and not isinstance(job.validate, SplitMetric):
        return [Judged(metric) for metric in metrics]
    if not path.exists():
        values, divergences = _on_samples(job, job.model, networks)
        write_tensors(path, {"values": values, "divergences": divergences})
    kept = read_tensors(path)
    if job.validate is None:
        return [Judged(None, divergence=distance) for distance in kept["divergences"].tolist()]
    pairs = zip(kept["values"], kept["divergences"].tolist(), strict=True)
    return [Judged(float(values.mean()), values, distance) for values, distance in pairs]


def measured_in_training(job: Job, network: nn.Module) -> dict[str, float]:
    """The validation metric, if there is one, and the divergence of a network where it is trained; see `Judged`.

    Args:
        job: Its validation metric is one by name, or there is none.
        network: It and the original end in evaluation mode.
    """
    values, divergences = _on_samples(job, job.teacher, [network])
    metric = {} if job.validate is None else {"metric": float(values.mean())}
    distance = _distance(Judged(None, divergence=float(divergences[0])))
    # The curve is kept as JSON, which has no infinity.
    return {**metric, "divergence": min(distance, sys.float_info.max)}


def preferred(found: Sequence[Judged], by: ChosenBy = "metric") -> int:
    """Index of the best network by the metric, or else by how far its outputs are from those wanted.

    Of those whose metric chance alone may have put below the best one's, as the differences on the samples show, the
    one whose outputs diverge least: that counts what every output has lost, the metric often only the few samples whose
    answer has changed. All that are to be compared are compared at once: small losses that are chance would add up.

    Args:
        found: What is known of the networks.
        by: With "divergence" that alone counts, as it does without metrics.
    """
    alike, metrics = list(range(len(found))), [one.metric for one in found if one.metric is not None]
    if len(metrics) < len(found):
        return min(alike, key=lambda index: _distance(found[index]))
    if by == "metric":
        best = max(alike, key=lambda index: metrics[index])
        alike = [index for index in alike if index == best or not _is_told_apart(found[best], found[index])]
    return min(alike, key=lambda index: (_distance(found[index]), -metrics[index]))


def _is_told_apart(best: Judged, other: Judged) -> bool:
    """Whether a metric is below another one by more than chance, as the normal approximation has it.

    Differences on the samples have either sign alike if they are chance: then their sum has the variance of the sum of
    their squares. Of shares that are right this is McNemar's test.

    Source: McNemar 1947, Note on the sampling error of the difference between correlated proportions or percentages.
    """
    if best.values is None or other.values is None:
        return True
    lost = best.values - other.values
    return bool(lost.sum() > STANDARD_ERRORS * lost.square().sum().sqrt())


def _distance(found: Judged) -> float:
    """The divergence; outputs that are NaN or infinite somewhere are furthest off."""
    return found.divergence if math.isfinite(found.divergence) else math.inf


@torch.no_grad()
def _on_samples(job: Job, original: nn.Module, networks: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
    """Of K networks: the metric of every sample, (K, N), and the mean divergence from what is wanted, (K,).

    The samples are those of the metric, or the hold-out's where there is none, and no values then, (K, 0). The networks
    are on the device of the original.
    """
    metric, name, device = job.validate, job.settings.search.divergence, device_of(original)
    assert metric is None or isinstance(metric, SplitMetric)
    samples = ((inputs, None) for inputs in job.holdout) if metric is None else batches(metric.split, metric.batch_size)
    seen = 0
    values: list[list[Tensor]] = [[] for _ in networks]
    summed = torch.zeros(len(networks), dtype=torch.float64)
    for network in (original, *networks):
        network.eval()
    for inputs, target in samples:
        inputs, size = to_device(inputs, device), batch_size(inputs)
        seen += size
        reference = run_model(original, inputs)
        if job.trains and job.settings.finetune.mirrored_teacher:
            reference = mean_with_mirrored(original, inputs, reference)
        for index, network in enumerate(networks):
            output = run_model(network, inputs)
            if metric is not None:
                values[index].append(values_of_samples(metric.name, output, target))
            summed[index] += float(divergence(name, output, reference)) * size
    return torch.stack([torch.cat(own) if own else torch.empty(0) for own in values]), summed / seen
