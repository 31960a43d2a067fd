from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sekron_search.errors import ConfigError, DataError, DivergedError
from sekron_search.files import read_json, write_json
from sekron_search.finetune import Distillation
from sekron_search.learning_rate import (
    FACTOR,
    MOST_TIMES,
    START,
    _minimum,
    find_learning_rate,
    raised,
    trial_steps,
    tuned,
)
from sekron_search.precision import autocast_dtype
from sekron_search.progress import Reporter
from sekron_search.sections import FinetuneConfig
from sekron_search.training_data import TrainingData
from tests.cases import small_net
from tests.test_finetune import compressed, distillation


def fake_losses(monkeypatch: pytest.MonkeyPatch, loss: Any) -> list[float]:
    """Short trainings reach a loss that is a function of the rate; the rates that were tried."""
    tried: list[float] = []

    def train(self: Distillation, model: nn.Module, *, measure: Any, **_: Any) -> list[dict[str, float]]:
        tried.append(self.rate)
        if math.isinf(loss(self.rate)):
            raise DivergedError("too far")
        return [measure(model)]

    monkeypatch.setattr(Distillation, "train", train)
    monkeypatch.setattr(Distillation, "loss_of", lambda self, *_: loss(self.rate))
    return tried


@pytest.mark.parametrize("best", [2e-5, 3e-4, 1e-3, 1.3e-3, 0.2])
def test_the_best_rate_of_a_parabola_is_found(monkeypatch: pytest.MonkeyPatch, best: float) -> None:
    tried = fake_losses(monkeypatch, lambda rate: 2 + math.log(rate / best) ** 2)
    task = distillation(learning_rate="auto")
    found = find_learning_rate(task, compressed(task.teacher), Reporter())
    assert found.best_in_trials == pytest.approx(best, rel=1e-6)
    assert found.learning_rate == raised(found.best_in_trials, task.total_steps)
    assert sorted(tried) == [rate for rate, _ in found.trials]
    assert len(tried) == len(set(tried)) <= 3 + abs(round(math.log(best / START, FACTOR)))


@pytest.mark.parametrize(
    ("rate", "times", "higher"),
    [
        (1e-4, 1, 1e-4),
        (1e-4, 16, 4e-4),
        (1e-4, 32, 32**0.5 * 1e-4),
        (1e-4, 1000, 32**0.5 * 1e-4),
        (4e-3, 32, 1e-2),
        (2e-2, 32, 2e-2),
    ],
)
def test_longer_trainings_get_higher_rates_as_far_as_was_measured(rate: float, times: float, higher: float) -> None:
    assert raised(rate, times) == pytest.approx(higher)


def test_trials_are_no_longer_than_an_epoch_and_rates_are_raised_by_what_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_losses(monkeypatch, lambda rate: 2 + math.log(rate / 1e-3) ** 2)
    task = distillation(learning_rate="auto", epochs=200)
    assert trial_steps(task.total_steps) > len(task.data)
    found = find_learning_rate(task, compressed(task.teacher), Reporter())
    assert found.learning_rate == pytest.approx(1e-3 * MOST_TIMES**0.5)


@pytest.mark.parametrize("highest", [1.1e-3, 2.2e-3])
def test_rates_close_below_those_that_diverge_are_not_raised(monkeypatch: pytest.MonkeyPatch, highest: float) -> None:
    fake_losses(monkeypatch, lambda rate: 2 + math.log(rate / 1e-3) ** 2 if rate < highest else math.inf)
    task = distillation(learning_rate="auto")
    found = find_learning_rate(task, compressed(task.teacher), Reporter())
    assert found.learning_rate == found.best_in_trials == pytest.approx(1e-3)


def test_rates_at_which_training_diverges_are_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_losses(monkeypatch, lambda rate: math.inf if rate > 2e-5 else 1 - rate)
    task = distillation(learning_rate="auto")
    found = find_learning_rate(task, compressed(task.teacher), Reporter())
    assert found.learning_rate == pytest.approx(1e-5)
    assert [loss for rate, loss in found.trials if rate > 2e-5] == [None] * 4


def test_training_that_diverges_at_every_rate_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_losses(monkeypatch, lambda rate: math.inf)
    task = distillation(learning_rate="auto")
    with pytest.raises(DataError, match=r"finetune\.learning_rate 'auto': .* at every rate down to 1e-07"):
        find_learning_rate(task, compressed(task.teacher), Reporter())


def test_the_minimum_stays_near_the_best_rate() -> None:
    assert _minimum(1.0, 1.0, 1.0) == 0.0
    assert _minimum(1.0, 0.0, math.inf) == 0.0
    assert _minimum(0.0, 0.0, 3.0) == -0.5
    assert _minimum(2.0, 1.0, 2.0) == 0.0


def test_it_is_found_once_and_changes_nothing(tmp_path: Path) -> None:
    task = distillation(learning_rate="auto", epochs=6)
    with pytest.raises(ConfigError, match=r"finetune\.learning_rate is 'auto'"):
        task.rate  # noqa: B018
    model = compressed(task.teacher)
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    path = tmp_path / "learning_rate.json"
    found = tuned(task, model, path, Reporter())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before[0].items())
    assert torch.equal(before[1], torch.get_rng_state())
    assert found.rate == read_json(path)["learning_rate"]
    assert found.config.epochs == 6
    assert len(found.data) == len(task.data)
    rates = dict(read_json(path)["trials"])
    assert min(rates.values()) < max(rates.values())
    write_json(path, {"learning_rate": 0.5, "trials": []})
    assert tuned(task, model, path, Reporter()).rate == 0.5
    assert tuned(distillation(), model, tmp_path / "none.json", Reporter()).rate == 3e-2
    assert not (tmp_path / "none.json").exists()


def test_a_short_training_is_a_whole_one_of_fewer_batches() -> None:
    task = distillation(accumulate=2).briefly(1)
    assert (len(task.data), task.total_steps) == (2, 1)
    counted: list[int] = []
    curve = task.train(
        compressed(task.teacher),
        checkpoint=None,
        measure=None,
        after_epoch=lambda *_: True,
        progress=counted.append,
    )
    assert len(curve) == 1
    assert counted == [1, 2]


@pytest.mark.parametrize("has", [{"avx512_bf16": True, "amx_bf16": False}, {"avx2": True, "avx512_bf16": False}])
def test_bfloat16_is_left_out_where_it_is_converted(monkeypatch: pytest.MonkeyPatch, has: dict[str, bool]) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    cpu = torch.device("cpu")
    assert autocast_dtype("auto", cpu) == (torch.bfloat16 if has["avx512_bf16"] else None)
    assert autocast_dtype("bfloat16", cpu) == torch.bfloat16
    assert autocast_dtype("float16", cpu) == torch.float16
    assert autocast_dtype(None, cpu) is None


@pytest.mark.parametrize("batches", [24, 4])
def test_trials_are_compared_on_what_they_are_not_trained_on(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Where there is something else; data without a length is counted no further than needed."""
    drawn: list[int] = []

    class Numbered:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(batches):
                drawn.append(number)
                yield torch.full((8, 3, 8, 8), float(number)), torch.zeros(8, dtype=torch.long)

    seen: dict[str, list[float]] = {"trained": [], "compared": []}

    def loss(
        self: Distillation, model: nn.Module, replaced: Any, weight: float, inputs: tuple[Tensor], target: Tensor
    ) -> Tensor:
        kind = "trained" if torch.is_grad_enabled() else "compared"
        seen[kind].append(float(inputs[0].mean()))
        return next(model.parameters()).square().sum()

    monkeypatch.setattr(Distillation, "_loss", loss)
    config = FinetuneConfig(epochs=2, batch_size=8, learning_rate="auto")
    task = Distillation(small_net(), TrainingData(Numbered(), 8), config, "kl")
    assert len(task.data) == batches
    drawn.clear()
    find_learning_rate(task, compressed(task.teacher), Reporter())
    steps = 3 if batches == 24 else 1
    assert set(seen["trained"]) == set(range(steps))
    assert set(seen["compared"]) == set(range(steps, min(batches, steps + 8)))
    assert max(drawn) < steps + 8
