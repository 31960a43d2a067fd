"""Jobs from configurations, and from run folders that hold one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import Dataset

from sekron_search.config import Config
from sekron_search.data import (
    DataBundle,
    SplitMetric,
    batches,
    length,
    load_data,
    sample_order,
    to_device,
    whole_batches,
)
from sekron_search.errors import ConfigError, DataError, RunFolderError
from sekron_search.export import Factory, load_weights
from sekron_search.files import read_yaml
from sekron_search.job import Job, checked_metric
from sekron_search.model import Inputs, batch_size, first_batches, joined, part_of
from sekron_search.references import import_reference
from sekron_search.rundir import RunFolder
from sekron_search.sections import MetricName
from sekron_search.training_data import TrainingData

#: Samples of a batch when a metric is evaluated.
EVALUATION_BATCH = 512


def job_from_config(config: Config) -> Job:
    """The job that a configuration describes: model, weights and data loaded and checked."""
    factory = Factory(config.model.factory, config.model.kwargs)
    model = factory.build()
    if config.model.weights is not None:
        load_weights(model, config.model.weights)
    return make_job(model, factory, load_data(config.data, config.seed), config)


def make_job(model: nn.Module, factory: Factory, data: DataBundle, config: Config) -> Job:
    """The job of a network, data and a configuration."""
    device = torch.device(config.device)
    model = model.to(device)
    section = config.calibration
    order = sample_order(length(data.train), config.seed)
    needed = section.samples + section.holdout
    if len(order) < needed:
        raise DataError(
            f"calibration: {section.samples} samples and {section.holdout} held-out ones are asked for, the training "
            f"data has {len(order)}; lower calibration.samples or calibration.holdout"
        )

    def drawn(indices: list[int]) -> list[Inputs]:
        found = [inputs for inputs, _ in batches(data.train, section.batch_size, order=indices)]
        return whole_batches(to_device(found, device))

    fit, holdout = drawn(order[: section.samples]), drawn(order[section.samples : needed])

    own = import_reference(config.metric, "metric") if ":" in config.metric else None

    def metric(split: Dataset[Any]) -> Callable[[nn.Module], float]:
        if own is not None:
            return checked_metric(lambda network: own(network, split), f"metric {config.metric!r}")
        return SplitMetric(split, cast(MetricName, config.metric), EVALUATION_BATCH)

    return Job(
        model,
        _example_batch(fit, config.latency.batch_size),
        fit,
        holdout,
        config,
        metric(data.validation),
        metric(data.test),
        TrainingData(data.train, config.finetune.batch_size, data.augment, config.seed),
        factory,
        source={"model": config.model.model_dump(mode="json"), "data": config.data.model_dump(mode="json")},
    )


def job_of_run(folder: RunFolder, otherwise: str) -> Job:
    """The job of a run, made again from its configuration.

    Args:
        folder: The run folder.
        otherwise: What to do where the run's network and data were given as objects, for the message.

    Raises:
        RunFolderError: If they were.
        SekronError: If they cannot be loaded.
    """
    if "model" not in read_yaml(folder.config, f"config {folder.config}"):
        raise RunFolderError(
            f"run folder {folder.path}: its network was given as an object, which no file names; {otherwise}"
        )
    return job_from_config(Config.load(folder.config))


def _example_batch(batches: Sequence[Inputs], size: int) -> Inputs:
    """The first `size` samples of calibration inputs, as the example batch.

    Raises:
        ConfigError: If there are too few samples.
    """
    whole = joined(first_batches(batches, size))
    if batch_size(whole) < size:
        raise ConfigError(
            f"latency.batch_size is {size}, but there are only {batch_size(whole)} calibration samples to fill it"
        )
    return part_of(whole, slice(size))
