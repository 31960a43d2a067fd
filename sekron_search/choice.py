"""Which of several networks is best, also where their metrics do not tell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sekron_search.data import SplitMetric, batches, to_device, values_of_samples
from sekron_search.divergence import divergence
from sekron_search.job import Job
from sekron_search.model import run_model

#: A metric is told apart from the best one if it is lower by more than so many standard errors of their difference.
STANDARD_ERRORS = 1.96


def preferred(job: Job, networks: Sequence[nn.Module], metrics: Sequence[float]) -> int:
    """Index of the best network by the validation metric, or else by how far its outputs are from the original's.

    Of those whose metric chance alone may have put below the best one's, as the differences on the samples show, the
    one whose outputs on the same samples diverge least from the original's: that counts what every output has lost,
    the metric often only the few samples whose answer has changed. A metric that is a function of the user's says
    nothing of its samples, and decides alone.

    Args:
        job: The original, and the validation metric.
        networks: Two or more; they end in evaluation mode.
        metrics: Theirs, on the validation data.

    Source: McNemar 1947, Note on the sampling error of the difference between correlated proportions; here for the mean
    of any metric of samples.
    """
    best = max(range(len(networks)), key=lambda index: metrics[index])
    if not isinstance(job.validate, SplitMetric) or len(networks) < 2:
        return best
    values, distances = _on_samples(job, job.validate, networks)
    alike = [index for index in range(len(networks)) if not _is_told_apart(values[best], values[index])]
    return min(alike, key=lambda index: distances[index])


def _is_told_apart(best: Tensor, other: Tensor) -> bool:
    """Whether a metric is below another one on more than by chance; both (N,), of the same samples."""
    lost = best - other
    return bool(lost.mean() > STANDARD_ERRORS * lost.std(correction=0) / len(lost) ** 0.5)


@torch.no_grad()
def _on_samples(job: Job, metric: SplitMetric, networks: Sequence[nn.Module]) -> tuple[list[Tensor], list[float]]:
    """Of every network: the metric of all samples (N,), and the divergence from the original on them."""
    name = job.settings.search.divergence
    values: list[list[Tensor]] = [[] for _ in networks]
    distances = [0.0 for _ in networks]
    for network in (job.model, *networks):
        network.eval()
    for inputs, target in batches(metric.split, metric.batch_size):
        inputs = to_device(inputs, metric.device)
        reference = run_model(job.model, inputs)
        for index, network in enumerate(networks):
            output = run_model(network, inputs)
            values[index].append(values_of_samples(metric.name, output, target))
            distances[index] += float(divergence(name, output, reference)) * len(values[index][-1])
    return [torch.cat(found) for found in values], distances
