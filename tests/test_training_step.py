"""Steps that are recorded on a GPU teach what steps that are not do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sekron_search.config import Config, FinetuneConfig
from sekron_search.errors import DivergedError
from sekron_search.finetune import Distillation
from sekron_search.jobs import job_from_config
from sekron_search.kron import families as fam
from sekron_search.kron.conv import KroneckerConv
from sekron_search.model import device_of, replace_layers
from sekron_search.progress import Reporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.tensor_files import read_checkpoint
from sekron_search.training_data import TrainingData
from sekron_search.training_state import processors_of
from sekron_search.training_step import StepGraph
from tests.cases import blobs, small_net, write_config

CUDA = torch.device("cuda")


class Looking(nn.Module):
    """A network that looks at values to choose what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found if float(found.detach().sum()) > 0 else found + 0


class Dropping(nn.Module):
    """A network that draws random numbers in training, and counts its passes in a buffer."""

    passes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = small_net(), nn.Dropout(0.2)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        found: Tensor = self.net(self.drop(x))
        return found


def compressed(teacher: nn.Module, name: str = "conv2") -> nn.Module:
    conv = teacher.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    return replace_layers(teacher, {name: KroneckerConv.from_conv(conv, fam.spatial_svd((12, 12, 3, 3), 2))})


def distillation(teacher: nn.Module, data: Any = None, **options: Any) -> Distillation:
    config = FinetuneConfig(**{"epochs": 3, "batch_size": 32, "learning_rate": 3e-2, **options})
    return Distillation(teacher, TrainingData(data or blobs(128), 32, seed=5), config, "kl")


def trained(task: Distillation, model: nn.Module, checkpoint: Path | None = None, until: int = 9) -> list[float]:
    curve = task.train(
        model,
        checkpoint=checkpoint,
        validate=None,
        after_epoch=lambda epoch, _: epoch < until,
        progress=lambda _: None,
    )
    return [row["loss"] for row in curve]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in model.state_dict().values()])


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every step that is played."""
    seen: list[int] = []
    replay = torch.cuda.CUDAGraph.replay

    def noted(self: torch.cuda.CUDAGraph) -> None:
        seen.append(1)
        replay(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", noted)
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("batch_norm", ["frozen", "trained"])
def test_recorded_steps_teach_what_others_do(replays: list[int], optimizer: str, batch_norm: str) -> None:
    """As on a CPU, where none are recorded, but for rounding; the given network stays where it was."""
    options = {"optimizer": optimizer, "batch_norm": batch_norm, "weight_decay": 0.1}
    here, there = distillation(small_net(), **options), distillation(small_net().to(CUDA), **options)
    ours, theirs = compressed(here.teacher), compressed(here.teacher)
    before = weights(ours)
    expected = trained(here, ours)
    assert not replays
    assert trained(there, theirs) == pytest.approx(expected, rel=0.02)
    assert len(replays) == there.total_batches
    assert device_of(theirs) == torch.device("cpu")
    assert (weights(theirs) - weights(ours)).norm() < 0.05 * (weights(ours) - before).norm()


@pytest.mark.gpu
def test_recordings_draw_and_count_as_steps_do(replays: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers are those of the epoch; steps before the recording leave nothing behind."""
    task = distillation(Dropping().to(CUDA), learning_rate=1e-3)
    model = compressed(task.teacher, "net.conv2")
    first = trained(task, model)
    assert model.get_buffer("passes") == len(replays) == task.total_batches
    again = compressed(task.teacher, "net.conv2")
    assert trained(task, again) == pytest.approx(first, rel=1e-4)


@pytest.mark.gpu
def test_a_recorded_training_is_gone_on_with(tmp_path: Path) -> None:
    """Also on another device than it was begun on."""
    for optimizer in ("muon", "adamw"):
        task = distillation(small_net().to(CUDA), optimizer=optimizer)
        whole = trained(task, compressed(task.teacher))
        for other in (task, distillation(small_net(), optimizer=optimizer)):
            path = tmp_path / f"{optimizer}-{device_of(other.teacher)}.pt"
            assert len(trained(task, compressed(task.teacher), path, until=1)) == 1
            assert trained(other, compressed(task.teacher), path) == pytest.approx(whole, rel=0.02)
            assert read_checkpoint(path)["curve"][-1]["epoch"] == 3


@pytest.mark.gpu
def test_what_cannot_be_recorded_is_computed_as_ever(replays: list[int]) -> None:
    task = distillation(Looking().to(CUDA), learning_rate=1e-3)
    model = compressed(task.teacher, "net.conv2")
    with pytest.warns(UserWarning, match="steps cannot be recorded as CUDA graphs"):
        losses = trained(task, model)
    assert not replays
    plain = distillation(Looking(), learning_rate=1e-3)
    assert losses == pytest.approx(trained(plain, compressed(plain.teacher, "net.conv2")), rel=0.02)


@pytest.mark.gpu
def test_batches_of_other_forms_are_not_played(replays: list[int]) -> None:
    """The shorter one at the end of a list of batches, here."""
    images, labels = blobs(112).tensors
    batches = list(zip(images.split(32), labels.split(32), strict=True))
    task, plain = distillation(small_net().to(CUDA), batches), distillation(small_net(), batches)
    assert trained(task, compressed(task.teacher)) == pytest.approx(trained(plain, compressed(plain.teacher)), rel=0.02)
    assert len(replays) == 3 * 3


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"accumulate": 2}, {"autocast": "float16"}, {"loss": "tests.test_training_step:own"}]
)
def test_steps_that_look_at_values_are_not_recorded(replays: list[int], options: dict[str, Any]) -> None:
    task = distillation(small_net().to(CUDA), **options)
    losses = trained(task, compressed(task.teacher))
    assert losses[-1] < losses[0]
    assert not replays


def own(output: Tensor, target: Tensor) -> Tensor:
    """A user's loss, which may do anything."""
    assert float(output.sum()) != 0
    return nn.functional.cross_entropy(output, target)


@pytest.mark.gpu
def test_a_recorded_training_that_diverges_is_told(tmp_path: Path) -> None:
    images = torch.full((64, 3, 8, 8), float("nan"))
    task = distillation(small_net().to(CUDA), TensorDataset(images, torch.zeros(64, dtype=torch.long)))
    with pytest.raises(DivergedError, match="the loss became nan in epoch 1, batch 1"):
        trained(task, compressed(task.teacher))


@pytest.mark.gpu
def test_a_network_for_a_cpu_is_trained_on_a_gpu(tmp_path: Path, replays: list[int]) -> None:
    """In a run that was begun without a GPU, whose result is as that of a run on CPUs."""
    text = write_config(tmp_path)
    plain, folder = Config.load(text), RunFolder(tmp_path / "run")
    there = plain.model_copy(update={"finetune": plain.finetune.model_copy(update={"device": "cuda"})})
    job = job_from_config(there)
    assert job.fingerprint() == job_from_config(plain).fingerprint()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run(job, folder, Reporter(), resume=False)
    assert replays
    assert device_of(job.model) == torch.device("cpu")
    assert report["compressed"]["metric"] >= report["original"]["metric"] - 0.05
    assert run(job_from_config(plain), folder, Reporter(), resume=True) == report


def test_without_a_gpu_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepGraph, "__init__", lambda *_: pytest.fail("recorded on a CPU"))
    task = distillation(small_net())
    losses = trained(task, compressed(task.teacher))
    assert losses[-1] < losses[0]


def test_where_is_trained_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    plain = Config.load(write_config(tmp_path))
    there = plain.model_copy(update={"finetune": plain.finetune.model_copy(update={"device": "cpu"})})
    one, other = job_from_config(plain), job_from_config(there)
    assert one.fingerprint() == other.fingerprint()
    assert other.teacher is other.model
    assert other.distillation is not None
    assert other.distillation.teacher is other.model


def test_all_that_trained_a_network_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, path = distillation(small_net()), tmp_path / "checkpoint.pt"
    assert processors_of(path) == ()
    for name, until in (("first", 1), ("second", 2), ("second", 9)):
        monkeypatch.setattr("sekron_search.training_state.processor_of", lambda _, name=name: name)
        trained(task, compressed(task.teacher), path, until)
    assert processors_of(path) == ("first", "second")
    trained(task, compressed(task.teacher), path)  # there is nothing left to train
    assert processors_of(path) == ("first", "second")
