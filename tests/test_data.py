"""Data of users: what batches hold, how they are shared out, which metrics take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from sekron_search.api import _halves
from sekron_search.data import batches, evaluate
from sekron_search.errors import DataError
from sekron_search.export import load_weights
from sekron_search.team import Team
from sekron_search.tensor_files import read_checkpoint, write_checkpoint
from sekron_search.training_data import TrainingData
from tests.cases import blobs


class Doubled(TensorDataset):
    """Gives twice what its tensors hold."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        images, labels = self.tensors
        return 2 * images[index], labels[index]


def test_samples_are_what_a_dataset_gives() -> None:
    (((images,), labels),) = batches(Doubled(*blobs(8).tensors), 8)
    torch.testing.assert_close(images, 2 * blobs(8).tensors[0])
    assert torch.equal(labels, blobs(8).tensors[1])


class Pairs(Dataset[Any]):
    """Two arguments, and no target."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return (torch.full((2,), index), torch.ones(3)), None


def test_samples_may_have_no_target() -> None:
    found = list(batches(Pairs(), 3))
    assert [target for _, target in found] == [None, None]
    assert [[tuple(one.shape) for one in inputs] for inputs, _ in found] == [[(3, 2), (3, 3)], [(2, 2), (2, 3)]]


@pytest.mark.parametrize("metric", ["neg_mse", "psnr"])
def test_targets_of_another_shape_are_not_broadcast(metric: Any) -> None:
    values = torch.rand(6, 1)
    assert evaluate(nn.Identity(), TensorDataset(values, values), metric, batch_size=4) in (0.0, 120.0)
    with pytest.raises(DataError, match=rf"'{metric}' is of targets of the output's shape \(4, 1\), got \(4,\)"):
        evaluate(nn.Identity(), TensorDataset(values, values[:, 0]), metric, batch_size=4)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ([7], ([3], [4])),
        ([128, 2], ([65], [63, 2])),
        ([128, 44], ([86], [42, 44])),
        ([128, 128, 44], ([128], [128, 44])),
        ([128, 128, 128], ([128, 128], [128])),
        ([1, 9], ([1, 4], [5])),
        ([9, 1], ([5], [4, 1])),
        ([64] * 4, ([64, 64], [64, 64])),
    ],
)
def test_about_half_of_the_samples_are_held_out(sizes: list[int], parts: tuple[list[int], list[int]]) -> None:
    samples = torch.arange(sum(sizes))
    halves = _halves([(part,) for part in samples.split(sizes)])
    assert tuple([len(images) for (images,) in half] for half in halves) == parts
    assert torch.equal(torch.cat([images for half in halves for (images,) in half]), samples)


class Noisy(Dataset[Any]):
    """Images that every look adds other noise to."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return index + torch.rand(3), index


def sources() -> dict[str, Any]:
    own = torch.Generator().manual_seed(1)
    return {
        "dataset": Noisy(),
        "loader": DataLoader(Noisy(), 4, shuffle=True),
        "loader with a generator": DataLoader(Noisy(), 4, shuffle=True, generator=own),
        "sampler with a generator": DataLoader(Noisy(), 4, sampler=RandomSampler(Noisy(), generator=own)),
        "batch sampler with a generator": DataLoader(
            Noisy(), batch_sampler=BatchSampler(RandomSampler(Noisy(), generator=own), 4, drop_last=False)
        ),
    }


@pytest.mark.parametrize("name", sources())
def test_an_epoch_is_the_same_whatever_else_draws_random_numbers(name: str) -> None:
    """So that a training that is gone on with ends where the whole one does."""
    data = TrainingData(sources()[name], 4, seed=2)

    def epoch(index: int) -> Tensor:
        torch.rand(index + 1)
        before = torch.get_rng_state()
        found = []
        for (images,), _ in data.epoch(index):
            found.append(images)
            torch.rand(2)  # as a dropout's
        torch.set_rng_state(before)
        return torch.cat(found)

    first, second, again = (epoch(index) for index in (1, 2, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first.floor().sort(0).values, first.floor())
    assert not torch.equal(first, second)
    assert torch.equal(first.floor().sort(0).values, second.floor().sort(0).values)


def test_what_is_drawn_for_batches_changes_nothing_else() -> None:
    data = TrainingData(sources()["loader"], 4)
    before = torch.get_rng_state()
    list(data.epoch(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_take_parts_of_the_same_batches() -> None:
    data = TrainingData(DataLoader(blobs(32), 8, shuffle=True), 8, seed=1)
    parts = [[images for (images,), _ in data.epoch(1, Team(rank, 2))] for rank in (0, 1)]
    together = torch.cat([torch.stack(pair, 1).flatten(0, 1) for pair in zip(*parts, strict=True)])
    assert torch.equal(together, torch.cat([images for (images,), _ in data.epoch(1)]))


def test_what_was_saved_on_a_gpu_is_read_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files that a GPU's tensors were written to name their device."""
    layer = nn.Linear(3, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(layer.state_dict(), tmp_path / "weights.pt")
        write_checkpoint(tmp_path / "checkpoint.pt", {"model": layer.state_dict()})
    other = nn.Linear(3, 2)
    load_weights(other, tmp_path / "weights.pt")
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(read_checkpoint(tmp_path / "checkpoint.pt")["model"]["bias"], layer.bias)
