"""Steps that are recorded on a GPU teach what steps that are not do."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sekron_search.config import Config
from sekron_search.errors import ConfigError, DataError, DivergedError
from sekron_search.finetune import Distillation
from sekron_search.jobs import job_from_config, job_of_run
from sekron_search.kron import families as fam
from sekron_search.kron.conv import KroneckerConv
from sekron_search.model import device_of, replace_layers
from sekron_search.progress import Reporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.sections import FinetuneConfig
from sekron_search.tensor_files import read_checkpoint
from sekron_search.training_data import TrainingData
from sekron_search.training_state import how_trained
from sekron_search.training_step import _changed, _kept_elsewhere
from tests.cases import CONFIG, blobs, small_net, write_config

CUDA = torch.device("cuda")


class Dropping(nn.Module):
    """A network that draws random numbers in training, and counts its passes in a buffer."""

    passes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()
        self.drop: nn.Module = nn.Dropout(0.2)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        found: Tensor = self.net(self.drop(x))
        return found


class Looking(Dropping):
    """A network that looks at values to choose what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found if float(found.detach().sum()) > 0 else found + 0


class Rolling(Dropping):
    """A network that draws random numbers of Python's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 0.1 * random.random())


class Counting(Dropping):
    """A network that counts its passes in Python."""

    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) * (1 + 0.01 * self.count)


class Replacing(Dropping):
    """A network that puts another tensor in a buffer's place."""

    def forward(self, x: Tensor) -> Tensor:
        self.passes = self.passes + 1
        return super().forward(x)


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
        measure=None,
        after_epoch=lambda row: row["epoch"] < until,
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
@pytest.mark.parametrize(("batch_norm", "mirrored"), [("frozen", False), ("trained", False), ("frozen", True)])
def test_recorded_steps_teach_what_others_do(
    replays: list[int], optimizer: str, batch_norm: str, mirrored: bool
) -> None:
    """As on a CPU, where none are recorded, but for rounding; the given network stays where it was."""
    options = {"optimizer": optimizer, "batch_norm": batch_norm, "mirrored_teacher": mirrored, "weight_decay": 0.1}
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
def test_recordings_draw_and_count_as_steps_do(replays: list[int]) -> None:
    """Random numbers are drawn anew in every step; steps before the recording leave nothing behind."""
    images, labels = blobs(32).tensors
    task = distillation(Dropping().to(CUDA), [(images, labels)], epochs=4, learning_rate=1e-12)
    model = compressed(task.teacher, "net.conv2")
    losses = trained(task, model)  # of the same batch and, but for rounding, the same weights
    assert len({round(loss, 4) for loss in losses}) == 4
    assert model.get_buffer("passes") == len(replays) == 4
    assert trained(task, compressed(task.teacher, "net.conv2")) == pytest.approx(losses, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(("first", "second"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_a_recorded_training_is_gone_on_with(tmp_path: Path, optimizer: str, first: str, second: str) -> None:
    """Also on another device than it was begun on."""
    tasks = {name: distillation(small_net().to(name), optimizer=optimizer) for name in ("cpu", "cuda")}
    whole, path = trained(tasks["cpu"], compressed(small_net())), tmp_path / "checkpoint.pt"
    assert len(trained(tasks[first], compressed(small_net()), path, until=1)) == 1
    assert trained(tasks[second], compressed(small_net()), path) == pytest.approx(whole, rel=0.02)
    assert read_checkpoint(path)["curve"][-1]["epoch"] == 3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Looking, Rolling, Counting, Replacing])
def test_what_cannot_be_recorded_is_computed_as_ever(replays: list[int], kind: type[nn.Module]) -> None:
    """By a network that also draws random numbers on the GPU, whose generator a failed recording must not keep."""
    task = distillation(kind().to(CUDA), learning_rate=1e-12)
    with pytest.warns(UserWarning, match="steps cannot be recorded as CUDA graphs"):
        losses = trained(task, compressed(task.teacher, "net.conv2"))
    assert not replays
    assert len({round(loss, 4) for loss in losses}) == 3
    torch.rand(3, device=CUDA)


def test_what_passes_keep_elsewhere_is_seen() -> None:
    """What a recording would repeat as it was in the recorded step; steps of plain and of compressed networks."""
    x = torch.randn(4, 3, 8, 8)
    told: dict[type[Dropping], str | None] = {
        Rolling: "Python's random numbers",
        Counting: ".count",
        Replacing: ".passes",
        Dropping: None,
    }
    for kind, name in told.items():
        net = kind().train()
        net.drop = nn.Identity()  # else the CPU's random numbers are drawn here
        before = _kept_elsewhere(net)
        net(x).sum().backward()
        assert _changed(before, _kept_elsewhere(net)) == name
    small = compressed(small_net()).train()
    before = _kept_elsewhere(small)
    small(x).sum().backward()
    assert _changed(before, _kept_elsewhere(small)) is None
    torch.rand(1)
    assert _changed(before, _kept_elsewhere(small)) == "random numbers of the CPU"
    np.random.rand()  # noqa: NPY002
    before["random numbers of the CPU"] = torch.get_rng_state().tolist()
    assert _changed(before, _kept_elsewhere(small)) == "numpy's random numbers"


@pytest.mark.gpu
def test_labels_are_checked_in_steps_that_are_played() -> None:
    images, labels = blobs(128).tensors
    labels = labels.clone()
    labels[70] = -100
    batches = list(zip(images.split(32), labels.split(32), strict=True))
    with pytest.raises(DataError, match="labels run from -100"):
        trained(distillation(small_net().to(CUDA), batches), compressed(small_net()))
    losses = trained(distillation(small_net().to(CUDA), batches, label_weight=0.0), compressed(small_net()))
    assert losses[-1] < losses[0]


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
def test_a_run_for_a_cpu_is_trained_on_a_gpu(
    tmp_path: Path, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is begun without one, trained, and gone on with at home."""
    path = write_config(tmp_path)
    plain, folder = Config.load(path), RunFolder(tmp_path / "run")
    there = plain.model_copy(update={"finetune": plain.finetune.model_copy(update={"device": "cuda"})})
    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(job_from_config(plain), folder, Reporter(), resume=False)
    with monkeypatch.context() as patch:
        patch.setattr("sekron_search.candidates.judged", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(job_from_config(there), folder, Reporter(), resume=True)
    assert replays
    replays.clear()
    report = run(job_from_config(plain), folder, Reporter(), resume=True)
    assert not replays
    assert report["compressed"]["metric"] >= report["original"]["metric"] - 0.05
    assert report["as_fitted"] or report["training"]["trained_on"] == [torch.cuda.get_device_name()]


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_a_gpu_has_to_be_there_when_there_is_something_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was trained on a GPU is looked at, exported and selected from without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = Config.load(write_config(tmp_path, CONFIG, **{"finetune: {": "finetune: {device: cuda, "}))
    says = r"^config key 'finetune\.device': torch sees no CUDA device here, got 'cuda'; go on where there is one"
    with pytest.raises(ConfigError, match=says):
        run(job_from_config(config), RunFolder(tmp_path / "refused"), Reporter(), resume=False)
    assert not (tmp_path / "refused" / "candidates").exists()
    home = RunFolder(tmp_path / "done")
    run(job_from_config(Config.load(write_config(tmp_path))), home, Reporter(), resume=False)
    text = home.config.read_text()
    assert "device: null" in text
    home.config.write_text(text.replace("device: null", "device: cuda"))  # as where it was trained
    job = job_of_run(home, "")
    assert job.settings.finetune.device == "cuda"
    home.check(job.fingerprint())


def test_without_a_gpu_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sekron_search.training_step.StepGraph", lambda *_: pytest.fail("recorded on a CPU"))
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
    assert how_trained(path)["trained_on"] == []
    for name, until in (("first", 1), ("second", 2), ("second", 9)):
        monkeypatch.setattr("sekron_search.training_state.processor_of", lambda _, name=name: name)
        trained(task, compressed(task.teacher), path, until)
    assert how_trained(path)["trained_on"] == ["first", "second"]
    trained(task, compressed(task.teacher), path)  # there is nothing left to train
    assert how_trained(path)["trained_on"] == ["first", "second"]
