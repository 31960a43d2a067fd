"""The choice between networks whose metrics hardly differ."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sekron_search.candidates import Finder
from sekron_search.choice import Judged, judged, measured_in_training, preferred
from sekron_search.config import Config
from sekron_search.data import SplitMetric
from sekron_search.divergence import kl_divergence
from sekron_search.errors import ConfigError
from sekron_search.job import Job
from sekron_search.jobs import job_from_config
from sekron_search.prepare import checked_layers
from tests.cases import CONFIG, write_config


class Answers(nn.Module):
    """Logits of two classes for numbers (N, 1) of samples: `sure` of class 0, and of class 1 where it is wrong."""

    def __init__(self, sure: float, wrong: range = range(0)) -> None:
        super().__init__()
        self.sure, self.wrong = sure, wrong

    def forward(self, number: Tensor) -> Tensor:
        sign = torch.tensor([-1.0 if int(n) in self.wrong else 1.0 for n in number])
        return torch.stack([self.sure * sign, torch.zeros(len(number))], 1)


class Image(nn.Module):
    """One half for every sample, off by so much in those named."""

    def __init__(self, error: float, where: range) -> None:
        super().__init__()
        self.error, self.where = error, where

    def forward(self, number: Tensor) -> Tensor:
        return torch.stack([self.error * float(int(n) in self.where) * torch.ones(1) for n in number]) + 0.5


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Of a network that answers 1,000 samples rightly, and is rather sure."""
    split = TensorDataset(torch.arange(1000.0)[:, None], torch.zeros(1000, dtype=torch.long))
    metric = SplitMetric(split, "accuracy", 64)
    found = job_from_config(Config.load(write_config(tmp_path, CONFIG)))
    return replace(found, model=Answers(2.0), validate=metric)


def chosen(job: Job, *networks: nn.Module) -> int:
    assert job.validate is not None
    with TemporaryDirectory() as folder:
        metrics = [job.validate(network) for network in networks]
        return preferred(judged(job, networks, metrics, Path(folder) / "judged.safetensors"))


def test_what_is_clearly_better_is_taken_though_its_outputs_are_further_off(job: Job) -> None:
    assert chosen(job, Answers(2.0, range(10)), Answers(0.1)) == 1
    assert chosen(job, Answers(0.1), Answers(2.0, range(10))) == 0


def test_where_chance_may_have_decided_the_nearer_outputs_are_taken(job: Job) -> None:
    few = Answers(2.0, range(3))
    assert chosen(job, Answers(0.1), few) == 1
    assert chosen(job, few, Answers(0.1)) == 0
    # As many other samples wrong: twelve against nine of 1,000 is no difference, twelve against one is.
    assert chosen(job, Answers(1.9, range(9)), Answers(2.0, range(500, 512))) == 0
    assert chosen(job, Answers(0.1, range(1)), Answers(2.0, range(500, 512))) == 0
    assert chosen(job, Answers(0.1, range(9)), Answers(2.0, range(500, 512))) == 1
    assert chosen(job, Answers(0.5), Answers(0.1), Answers(1.0), Answers(3.0, range(300))) == 2


def test_equals_are_told_by_their_order(job: Job) -> None:
    assert chosen(job, Answers(1.0), Answers(1.0)) == 0


def test_a_function_of_the_users_decides_alone(job: Job) -> None:
    sure: Any = lambda network: network.sure  # noqa: E731
    own = replace(job, validate=sure)
    assert chosen(own, Answers(2.0), Answers(2.1)) == 1
    assert chosen(own, Answers(2.1), Answers(2.0)) == 0


def shares(*wrong: int, of: int = 1000, distance: float = 1.0) -> Judged:
    """Of a network that answers all samples rightly but some."""
    values = torch.ones(of, dtype=torch.float64)
    values[list(wrong)] = 0
    return Judged(float(values.mean()), values, distance)


@pytest.mark.parametrize(("wrong", "of", "apart"), [(1, 1, False), (3, 3, False), (3, 1000, False), (4, 4, True)])
def test_few_samples_tell_little(wrong: int, of: int, apart: bool) -> None:
    """McNemar's z of n against none is the root of n."""
    found = [shares(of=of, distance=2.0), shares(*range(wrong), of=of, distance=1.0)]
    assert preferred(found) == (0 if apart else 1)


def test_by_divergence_alone_the_metric_does_not_count() -> None:
    found = [shares(distance=3.0), shares(*range(500), distance=1.0), shares(1, distance=float("nan"))]
    assert preferred(found) == 0
    assert preferred(found, "divergence") == 1


@pytest.mark.parametrize(("choice", "nearest"), [("metric", 0), ("divergence", 1)])
def test_candidates_are_told_apart_as_the_configuration_says(job: Job, choice: str, nearest: int) -> None:
    finetune = job.settings.finetune.model_copy(update={"choice": choice})
    asked = replace(job, settings=job.settings.model_copy(update={"finetune": finetune}))
    found: Any = [SimpleNamespace(judged=shares(distance=3.0)), SimpleNamespace(judged=shares(*range(9), distance=1.0))]
    mine: Any = SimpleNamespace(job=asked)
    assert Finder._best(mine, found) is found[nearest]


def test_a_choice_by_what_is_not_known_is_refused_before_long_work(tmp_path: Path) -> None:
    text = CONFIG.replace("epochs: 2,", "epochs: 2, choice: divergence,")
    job = job_from_config(Config.load(write_config(tmp_path, text)))
    assert checked_layers(job).layers
    for validate, came in ((None, "no data"), (lambda network: 1.0, "a function of yours")):
        with pytest.raises(ConfigError, match=f"'finetune.choice': 'divergence' compares .* got {came}; give both"):
            checked_layers(replace(job, validate=validate))


def test_small_losses_do_not_add_up() -> None:
    best, other, third = shares(distance=3.0), shares(1, 2, 3, distance=2.0), shares(*range(4, 12), distance=1.0)
    assert preferred([best, other]) == 1
    assert preferred([other, third]) == 1
    assert preferred([best, other, third]) == 1, "the third one is clearly below the first"


def test_outputs_that_are_no_numbers_are_furthest_off() -> None:
    lost = shares(1, distance=float("nan"))
    assert preferred([lost, shares(2, distance=9.0)]) == 1
    assert preferred([shares(1, 2, distance=float("nan")), lost]) == 1, "then the metric decides"


class Dropped(Answers):
    """Answers wrongly while it is trained."""

    def forward(self, number: Tensor) -> Tensor:
        return super().forward(number) * (-1 if self.training else 1)


def test_networks_are_judged_as_they_will_run_once_and_by_all_samples(job: Job, tmp_path: Path) -> None:
    path, networks = tmp_path / "judged.safetensors", [Dropped(1.0).train(), Answers(0.5, range(999, 1000))]
    first, second = judged(job, networks, [0.0, 0.0], path)
    assert (first.metric, second.metric) == (1.0, 0.999)
    assert first.values is not None
    assert first.values.shape == (1000,)
    # The last batch is smaller, its one wrong sample counts as every other one.
    alone = [
        float(kl_divergence(torch.tensor([[0.5 * sign, 0.0]]), torch.tensor([[2.0, 0.0]]))) for sign in (1.0, -1.0)
    ]
    assert second.divergence == pytest.approx((999 * alone[0] + alone[1]) / 1000, rel=1e-5)
    again = judged(replace(job, model=nn.Identity()), networks, [0.0, 0.0], path)
    assert [one.divergence for one in again] == [first.divergence, second.divergence]


def test_outputs_are_compared_with_what_a_mirrored_teacher_gives(job: Job, tmp_path: Path) -> None:
    """The mean of left and right halves' brightness, where the original looks at the left one alone."""

    class Half(nn.Module):
        def __init__(self, left: float) -> None:
            super().__init__()
            self.left = left

        def forward(self, images: Tensor) -> Tensor:
            left, right = images[..., :2].mean((1, 2, 3)), images[..., 2:].mean((1, 2, 3))
            return torch.stack([self.left * left + (1 - self.left) * right, torch.zeros(len(images))], 1)

    split = TensorDataset(torch.rand(100, 1, 4, 4), torch.zeros(100, dtype=torch.long))
    networks = [Half(1.0), Half(0.5)]
    for mirrored, epochs, nearest in ((False, 1, 0), (True, 1, 1), (True, 0, 0)):  # nobody teaches in no epoch
        finetune = job.settings.finetune.model_copy(update={"mirrored_teacher": mirrored, "epochs": epochs})
        settings = job.settings.model_copy(update={"finetune": finetune})
        asked = replace(job, model=Half(1.0), settings=settings, validate=SplitMetric(split, "accuracy", 64))
        marks = judged(asked, networks, [1.0, 1.0], tmp_path / f"{mirrored}-{epochs}.safetensors")
        assert marks[nearest].divergence == pytest.approx(0, abs=1e-6)
        assert marks[1 - nearest].divergence > 1e-4
        assert preferred(marks) == nearest
        for network, mark in zip(networks, marks, strict=True):  # halving goes by the same
            measured = measured_in_training(asked, network)
            assert measured == {"metric": mark.metric, "divergence": pytest.approx(mark.divergence, abs=1e-9)}
        broken = measured_in_training(asked, Half(float("nan")))["divergence"]
        assert 1e300 < broken < math.inf, "the furthest off, and a number that JSON has"


def test_images_are_told_apart_by_their_errors(job: Job) -> None:
    assert isinstance(job.validate, SplitMetric)
    split = TensorDataset(torch.arange(40.0)[:, None], torch.full((40, 1), 0.5))
    settings = job.settings.model_copy(update={"search": job.settings.search.model_copy(update={"divergence": "mse"})})
    original = Image(0.1, range(20, 40))
    images = replace(job, model=original, settings=settings, validate=replace(job.validate, split=split, name="psnr"))
    # 0.1 and 0.101 in the same samples: 0.09 dB, in every one of them. The original's own errors count for nothing.
    assert chosen(images, Image(0.101, range(20, 40)), original) == 1
    assert chosen(images, Image(0.09, range(20, 40)), original) == 0
    # Errors in other samples, as large: chance.
    assert chosen(images, Image(0.0999, range(20)), Image(0.1001, range(20, 40))) == 1
