"""Metrics by name, and the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sekron_search.config import Config
from sekron_search.data import evaluate
from sekron_search.errors import ConfigError, DataError
from sekron_search.jobs import job_from_config
from sekron_search.prepare import checked_layers
from tests.cases import CONFIG, write_config


def biggest_output(network: nn.Module, dataset: Any) -> float:
    """A metric of the user's."""
    return float(network(dataset.tensors[0]).max())


def nothing(network: nn.Module, dataset: Any) -> None:
    """No metric."""


def job_of(folder: Path, metric: str) -> Any:
    return job_from_config(Config.load(write_config(folder, f"{CONFIG}metric: {metric}\n")))


def test_the_users_metric_sees_network_and_split(tmp_path: Path) -> None:
    job = job_of(tmp_path, f"{__name__}:biggest_output")
    assert job.settings.metric_name == "biggest_output"
    job.model.eval()
    with torch.no_grad():
        values = [metric(job.model) for metric in (job.validate, job.test)]
    assert values[0] != values[1]
    assert all(isinstance(value, float) for value in values)


def test_images_are_no_classes() -> None:
    images = TensorDataset(torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8))
    with pytest.raises(DataError, match=r"'accuracy' is of integer class labels, .* set metric to 'neg_mse', 'psnr'"):
        evaluate(nn.Identity(), images, "accuracy", batch_size=2)


@pytest.mark.parametrize("name", ["psnr", "neg_mse"])
def test_metrics_of_values_are_refused_beside_a_divergence_of_logits(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'metric': '{name}' compares values, .* search\.divergence to 'mse'"):
        checked_layers(job_of(tmp_path, name))


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        (
            f"{__name__}:nothing",
            DataError,
            "metric 'tests.test_metric:nothing': expected a function that returns a number",
        ),
        (f"{__name__}:lost", ConfigError, "key 'metric': cannot import 'tests.test_metric:lost'"),
        ("top5", ConfigError, "key 'metric': expected accuracy, neg_mse, psnr or a function of your own"),
    ],
)
def test_what_is_no_metric_is_refused(tmp_path: Path, name: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        job_of(tmp_path, name).validate(nn.Identity())
