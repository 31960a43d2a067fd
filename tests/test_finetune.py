from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from sekron_search.config import make_settings
from sekron_search.errors import ConfigError, DataError, DivergedError
from sekron_search.finetune import FAR, Distillation
from sekron_search.kron import families as fam
from sekron_search.kron.conv import KroneckerConv
from sekron_search.kron.structure import Structure
from sekron_search.layer_outputs import channel_spread, layer_error, seen
from sekron_search.learning_rate import tuned
from sekron_search.losses import distillation_loss
from sekron_search.model import copy_model, replace_layers
from sekron_search.progress import Reporter
from sekron_search.sections import FinetuneConfig
from sekron_search.tensor_files import read_checkpoint
from sekron_search.training_data import TrainingData
from tests.cases import blobs, small_net


def compressed(teacher: nn.Module) -> nn.Module:
    conv = teacher.get_submodule("conv2")
    assert isinstance(conv, nn.Conv2d)
    return replace_layers(teacher, {"conv2": KroneckerConv.from_conv(conv, fam.spatial_svd((12, 12, 3, 3), 2))})


def distillation(**options: Any) -> Distillation:
    config = FinetuneConfig(**{"epochs": 3, "batch_size": 32, "learning_rate": 3e-2, **options})
    return Distillation(small_net(), TrainingData(blobs(128), 32, seed=5), config, "kl")


def train(task: Distillation, model: nn.Module, checkpoint: Path, **options: Any) -> list[dict[str, float]]:
    quiet: dict[str, Any] = {"measure": None, "after_epoch": lambda *_: True, "progress": lambda _: None}
    return task.train(model, checkpoint=checkpoint, **{**quiet, **options})


def test_training_lowers_the_loss_and_leaves_the_teacher_alone(tmp_path: Path) -> None:
    task = distillation()
    before = copy.deepcopy(task.teacher.state_dict())
    model = compressed(task.teacher)
    curve = train(task, model, tmp_path / "checkpoint.pt")
    assert [row["epoch"] for row in curve] == [1, 2, 3]
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]
    assert not model.training
    seen = list(task.data.epoch(1))
    assert task.loss_of(model, seen) == replace(
        task, config=task.config.model_copy(update={"layer_weight": 1000.0})
    ).loss_of(model, seen)
    assert task.loss_of(model, seen) < 0.7 * task.loss_of(compressed(task.teacher), seen)
    assert all(torch.equal(before[name], t) for name, t in task.teacher.state_dict().items())
    assert all(p.is_contiguous() for p in [*model.parameters(), *task.teacher.parameters()])


def test_a_resumed_training_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    task = distillation()
    whole, resumed = compressed(task.teacher), compressed(task.teacher)
    curve = train(task, whole, tmp_path / "whole.pt")
    stopped = train(task, resumed, tmp_path / "parts.pt", after_epoch=lambda row: row["epoch"] < 1)
    assert len(stopped) == 1
    again = compressed(task.teacher)
    assert train(task, again, tmp_path / "parts.pt") == curve
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in whole.state_dict().items())


def test_errors_of_layers_count_less_and_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the whole weight to next to nothing; a training that was stopped goes on where it was."""
    weights: list[float] = []
    loss = Distillation._loss

    def noted(self: Distillation, model: nn.Module, replaced: Any, weight: float, *batch: Any) -> Tensor:
        assert replaced == ["conv2"]
        weights.append(weight)
        return loss(self, model, replaced, weight, *batch)

    monkeypatch.setattr(Distillation, "_loss", noted)
    task = distillation(layer_weight=4.0)
    train(task, compressed(task.teacher), tmp_path / "parts.pt", after_epoch=lambda row: row["epoch"] < 1)
    train(task, compressed(task.teacher), tmp_path / "parts.pt")
    assert len(weights) == task.total_batches == 12
    assert weights == sorted(weights, reverse=True)
    assert weights[0] == 4
    assert weights[6] == pytest.approx(2)
    assert weights[-1] < 0.1
    weights.clear()
    train(task.briefly(3), compressed(task.teacher), tmp_path / "brief.pt")
    assert weights == [4.0] * 3


def test_a_loss_that_explodes_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    task = distillation()
    model = compressed(task.teacher)
    train(task, model, tmp_path / "checkpoint.pt", after_epoch=lambda row: row["epoch"] < 1)
    broken = distillation()
    with torch.no_grad():
        next(broken.teacher.parameters()).fill_(float("nan"))
    says = r"^fine-tuning: the loss became nan in epoch {}, batch 1; lower finetune\.learning_rate \(now 0\.03\)$"
    with pytest.raises(DivergedError, match=says.format(2)) as told:
        train(broken, model, tmp_path / "checkpoint.pt")
    assert told.value.curve == read_checkpoint(tmp_path / "checkpoint.pt")["curve"]
    assert len(told.value.curve) == 1
    with pytest.raises(DivergedError, match=says.format(1)) as told:
        train(broken, model, tmp_path / "none.pt")
    assert told.value.curve == []
    assert not (tmp_path / "none.pt").exists()


def without_a_slope(output: Any, target: Any) -> Tensor:
    """A loss of zero, whose gradient is NaN."""
    nothing: Tensor = 0 * output.sum()
    return nothing.sqrt()


def test_weights_that_the_last_step_breaks_are_not_kept(tmp_path: Path) -> None:
    task = distillation(loss=f"{__name__}:without_a_slope", label_weight=1.0, layer_weight=0.0, batch_size=128)
    task = replace(task, data=TrainingData(blobs(128), 128))
    with pytest.raises(DivergedError, match="a weight became NaN or infinite in the last step of epoch 1"):
        train(task, compressed(task.teacher), tmp_path / "checkpoint.pt")
    assert not (tmp_path / "checkpoint.pt").exists()


def test_gradients_that_were_left_in_the_network_do_not_count(tmp_path: Path) -> None:
    found = []
    for left in (None, 1e3):
        task = distillation(epochs=1)
        model = compressed(task.teacher)
        for parameter in model.parameters():
            parameter.grad = None if left is None else torch.full_like(parameter, left)
        train(task, model, tmp_path / f"{left}.pt")
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_gradients_of_several_batches_make_one_step(tmp_path: Path) -> None:
    """Batches of 8, four at a time, are those of 32 for a network without batch-norm; 3 are left over of 7."""
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.ReLU(), nn.Linear(16, 4))
    images = torch.randn(56, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    start = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.mul_(0.5)
    found = []
    for size, accumulate in ((8, 4), (32, 1)):
        loader = [(part,) for part in images.split(size)]
        config = FinetuneConfig(epochs=2, batch_size=size, learning_rate=1e-3, accumulate=accumulate, layer_weight=0.0)
        task = Distillation(teacher, TrainingData(loader, size), config, "kl")
        assert task.total_steps == 4
        model = copy.deepcopy(start)
        train(task, model, tmp_path / f"{size}.pt")
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(value, start.state_dict()[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_and_resumes_to_the_same(tmp_path: Path, dtype: str) -> None:
    task = distillation(autocast=dtype)
    model, again = compressed(task.teacher), compressed(task.teacher)
    curve = train(task, model, tmp_path / "whole.pt")
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    train(task, compressed(task.teacher), tmp_path / "parts.pt", after_epoch=lambda row: row["epoch"] < 2)
    assert train(task, again, tmp_path / "parts.pt") == curve
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("how", ["frozen", "trained"])
def test_statistics_of_batch_norms_are_kept_or_trained(tmp_path: Path, how: str) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.drop = nn.Dropout(0.1)  # as in networks whose norms hold what follows them
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(1)).eval()
    config = FinetuneConfig(epochs=1, learning_rate=1e-2, layer_weight=0.0, batch_norm=how)
    loader = [(torch.randn(16, 3, 6, 6),) for _ in range(4)]
    task = Distillation(teacher, TrainingData(loader, 16), config, "mse")
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(0.5)
    before = copy.deepcopy(model.state_dict())
    train(task, model, tmp_path / "checkpoint.pt")
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert same == ({"1.running_mean", "1.running_var", "1.num_batches_tracked"} if how == "frozen" else set())
    assert not model.training
    task.loss_of(model, task.data.epoch(1))
    assert model.get_submodule("1.drop").training
    assert model[1].training == (how == "trained")


def test_labels_and_loaders_are_taken(tmp_path: Path) -> None:
    teacher = small_net()
    loader: DataLoader[Any] = DataLoader(blobs(64), batch_size=16)
    task = Distillation(teacher, TrainingData(loader, 16), FinetuneConfig(epochs=1, learning_rate=1e-3), "mse")
    assert task.total_batches == task.total_steps == 4
    assert len(train(task, compressed(teacher), tmp_path / "checkpoint.pt")) == 1


def test_errors_of_layers_are_relative_to_what_channels_vary_by() -> None:
    generator = torch.Generator().manual_seed(0)
    maps, rows = 100 + torch.randn(4, 3, 5, 5, generator=generator), torch.randn(28, 6, generator=generator)
    for output, axes in ((maps, (0, 2, 3)), (rows, (0,))):
        spread = channel_spread(output)
        torch.testing.assert_close(spread, output.double().var(axes, correction=0).mean().float())
        assert float(layer_error(output, output, spread)) == 0
        assert float(layer_error(output + 3, output, spread)) == pytest.approx(9 / float(spread), rel=1e-5)
    assert float(channel_spread(torch.ones(2, 3, 4))) > 0  # something to divide by


@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_errors_of_layers_and_their_gradients_in_all_layouts(precision: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # More numbers than are summed at a time.
    output, reference = (3 + torch.randn(3, 50, 25, 24, generator=generator).to(precision) for _ in range(2))
    spread = channel_spread(reference)
    difference = output.double() - reference.double()
    wanted, gradient_wanted = difference.square().mean() / spread, 2 * difference / output.numel() / spread
    near, least = 2 * torch.finfo(precision).eps + 1e-5, torch.finfo(precision).tiny
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = output.contiguous(memory_format=layout).requires_grad_()
        loss = layer_error(leaf, reference.contiguous(memory_format=torch.channels_last), spread)
        # As under float16's scaling of losses, which keeps gradients in its range.
        (gradient,) = torch.autograd.grad(1024 * loss, leaf)
        torch.testing.assert_close(
            loss.double(), wanted.double(), rtol=1e-2 if precision.itemsize == 2 else 1e-5, atol=0
        )
        torch.testing.assert_close(gradient.double(), 1024 * gradient_wanted, rtol=near, atol=least)
        assert gradient.is_contiguous(memory_format=layout)
        assert gradient.dtype == precision


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_are_compared_as_they_leave_what_follows_may_overwrite_them(inplace: bool) -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    student = copy.deepcopy(teacher)
    for name, structure in (("0", "1x1x3x3[a] * 8x3x1x1[a]; a=2"), ("2", "1x1x3x3[a] * 8x8x1x1[a]; a=2")):
        conv = teacher.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        student.set_submodule(name, KroneckerConv.from_conv(conv, Structure.parse(structure)))
    data = TensorDataset(torch.randn(32, 3, 8, 8), torch.zeros(32, dtype=torch.long))
    task = Distillation(teacher, TrainingData(data, 16), FinetuneConfig(layer_weight=2, label_weight=0), "kl")
    assert [known.is_overwritten for known in task.references.values()] == [inplace, False, False]
    inputs = next(task.data.epoch(1))[0]
    with torch.no_grad():
        errors, ours, theirs = [], inputs[0], inputs[0]
        for mine, other in zip(student, teacher, strict=True):
            ours, theirs = mine(ours.clone()), other(theirs.clone())
            if isinstance(mine, KroneckerConv):
                errors.append((ours - theirs).square().mean() / theirs.var((0, 2, 3), correction=0).mean())
        alone = task._loss(student, [], 0.0, inputs, None)
        both = task._loss(student, ["0", "2"], 2.0, inputs, None)
    assert float(both - alone) == pytest.approx(float(errors[0] + errors[1]), rel=1e-4)


def test_the_loss_is_zero_at_the_teacher_and_mixes_in_the_labels() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    labels = torch.tensor([0, 1])
    pure = FinetuneConfig(label_weight=0, temperature=3)
    assert float(distillation_loss("kl", logits, logits, labels, pure)) == pytest.approx(0, abs=1e-6)
    mixed = FinetuneConfig(label_weight=0.25)
    expected = 0.25 * float(nn.functional.cross_entropy(logits, labels))
    assert float(distillation_loss("kl", logits, logits, labels, mixed)) == pytest.approx(expected, abs=1e-6)
    sure = nn.functional.one_hot(labels, 3).float()
    assert float(distillation_loss("kl", logits, logits, sure, mixed)) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(DataError, match=r"a target of torch.float32 of shape \(2,\); expected one of"):
        distillation_loss("kl", logits, logits, labels.float(), mixed)
    assert float(distillation_loss("mse", logits + 1, logits, None, pure)) == pytest.approx(
        1 / float(logits.var(correction=0))
    )


def test_values_are_compared_by_absolute_errors_where_that_is_asked_for() -> None:
    images, target = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    output = images + 0.1
    config = FinetuneConfig(loss="l1", label_weight=0.5)
    deviations = [(t - t.mean()).abs().mean() for t in (images, target)]
    expected = 0.5 * 0.1 / deviations[0] + 0.5 * (output - target).abs().mean() / deviations[1]
    assert float(distillation_loss("mse", output, images, target, config)) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ConfigError, match=r"'l1' compares values, not logits: set search\.divergence to 'mse'$"):
        make_settings({"flops": "0.5x"}, {"finetune": {"loss": "l1"}})


def half_of_it(output: Any, target: Any) -> torch.Tensor:
    """A user's loss, which changes the outputs in place."""
    output -= output.mean(1, keepdim=True)
    return nn.functional.cross_entropy(output, target) / 2


def a_number(output: Any, target: Any) -> float:
    """No loss."""
    return 1.0


def a_failure(output: Any, target: Any) -> torch.Tensor:
    """A loss with a bug."""
    raise KeyError("boxes")


class FailsLater:
    """A loss with a bug that the first two batches do not show: the one that is checked, and the first one trained."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: Any, target: Any) -> Tensor:
        self.calls += 1
        return half_of_it(output, {1: target, 2: target}[self.calls])


fails_later = FailsLater()


def test_a_loss_that_fails_later_is_told_too(tmp_path: Path) -> None:
    task = distillation(loss=f"{__name__}:fails_later", label_weight=1.0)
    task.check()
    with pytest.raises(DataError, match=r"finetune\.loss '.*:fails_later': it failed: KeyError: 3"):
        train(task, compressed(task.teacher), tmp_path / "checkpoint.pt")


def test_the_users_own_loss_stands_for_the_labels(tmp_path: Path) -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    config = FinetuneConfig(loss=f"{__name__}:half_of_it", label_weight=0.5)
    expected = 0.25 * float(nn.functional.cross_entropy(logits, labels))
    assert float(distillation_loss("kl", logits, logits, labels, config, half_of_it)) == pytest.approx(expected)
    task = distillation(loss=f"{__name__}:half_of_it", label_weight=1.0)
    task.check()
    curve = train(task, compressed(task.teacher), tmp_path / "checkpoint.pt")
    assert curve[-1]["loss"] < curve[0]["loss"]
    for name, problem in (("a_number", "returns a scalar, got float"), ("a_failure", "it failed: KeyError: 'boxes'")):
        with pytest.raises(DataError, match=rf"finetune\.loss.*{problem}"):
            distillation(loss=f"{__name__}:{name}").check()
    with pytest.raises(ConfigError, match=r"finetune\.loss'.*cannot import"):
        distillation(loss="nowhere.at_all:loss").check()


def without_gradient(output: Any, target: Any) -> Tensor:
    """A loss that nothing can be learned from."""
    return nn.functional.cross_entropy(output, target).detach()


def nothing_here(output: Any, target: Any) -> Tensor:
    """A loss of a batch in which there is nothing to learn from."""
    return torch.zeros(())


def not_a_number(output: Any, target: Any) -> Tensor:
    """A loss that is never finite."""
    return nn.functional.cross_entropy(output, target) * float("nan")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"loss": f"{__name__}:without_gradient"}, DataError, r"finetune\.loss '.*': the value has no gradient"),
        ({"loss": f"{__name__}:not_a_number"}, DataError, r"finetune\.loss: the loss .* on the first batch is nan"),
        ({"loss": f"{__name__}:half_of_it", "label_weight": 0}, ConfigError, r"finetune\.label_weight: 0 leaves out"),
    ],
)
def test_a_loss_that_nothing_can_be_learned_from_is_told_before_the_search(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        distillation(**options).check()
    distillation(loss=f"{__name__}:nothing_here").check()


class WithoutGradients(nn.Module):
    """A network that computes as at inference, whoever asks."""

    def __init__(self) -> None:
        super().__init__()
        self.end = nn.Linear(3, 4)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.end(x.mean((2, 3)))
        return out


def test_training_data_that_nothing_can_be_learned_from_are_told_before_the_search() -> None:
    images, labels = blobs(64).tensors

    def check(data: TensorDataset, **options: Any) -> None:
        config = FinetuneConfig(learning_rate=1e-2, **options)
        Distillation(small_net(), TrainingData(data, 32), config, "kl").check()

    probabilities = nn.functional.one_hot(labels, 4).float() * 0.9 + 0.025
    ignored = probabilities * (labels[:, None] > 0)
    for good in (probabilities, probabilities.bfloat16(), ignored):
        check(TensorDataset(images, good))
    check(TensorDataset(images))
    with pytest.raises(DataError, match=r"train: the network gives NaN or infinity on the first batch"):
        check(TensorDataset(images * float("nan"), labels))
    for wrong in (2 * probabilities, probabilities - 0.5):
        with pytest.raises(DataError, match=r"shape \(32, 4\).*no probabilities .* search\.divergence to 'mse'"):
            check(TensorDataset(images, wrong))
    config = FinetuneConfig(learning_rate=1e-2)
    unable = Distillation(WithoutGradients(), TrainingData(TensorDataset(images), 32), config, "kl")
    with pytest.raises(DataError, match=r"computes under torch\.inference_mode"):
        unable.check()
    with pytest.raises(DataError, match=r"finetune\.label_weight is 1, .* and the data has none"):
        check(TensorDataset(images), label_weight=1.0)


@pytest.mark.parametrize("wrong", ["l2", "module.function", ":loss", "os.path:"])
def test_a_loss_or_metric_that_is_no_name_is_refused(wrong: str) -> None:
    for settings in ({"finetune": {"loss": wrong}}, {"metric": wrong}):
        with pytest.raises(
            ConfigError, match=r"expected \w+, .*or a function of your own as 'package\.module:function'"
        ):
            make_settings({"flops": "0.5x"}, settings)


def test_what_a_shuffling_loader_draws_first_changes_no_training(tmp_path: Path) -> None:
    teacher = small_net()
    loader: DataLoader[Any] = DataLoader(blobs(64), batch_size=16, shuffle=True)

    def curve(seed: int, name: str, epochs: int = 3) -> list[dict[str, float]]:
        torch.manual_seed(seed)
        config = FinetuneConfig(epochs=3, learning_rate=1e-2, layer_weight=8)
        task = Distillation(teacher, TrainingData(loader, 16), config, "mse")
        before = torch.get_rng_state()
        found = train(task, compressed(teacher), tmp_path / name, after_epoch=lambda row: row["epoch"] < epochs)
        assert torch.equal(torch.get_rng_state(), before)
        return found

    whole = curve(1, "whole")
    assert curve(2, "other") == whole
    assert curve(3, "resumed", epochs=1) == whole[:1]
    assert curve(4, "resumed") == whole


class Recomputing(nn.Module):
    """Keeps nothing of the convolution for the backward pass, and computes it again; may run it twice."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv2, self.end = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = checkpoint(lambda y: self.conv2(y).relu(), x, use_reentrant=False)
        out: torch.Tensor = self.end(x.mean((2, 3)))
        return out


@pytest.mark.parametrize("times", [1, 2])
def test_networks_that_compute_layers_again_are_trained(tmp_path: Path, times: int) -> None:
    torch.manual_seed(0)
    teacher = Recomputing(times)
    conv = KroneckerConv.from_conv(teacher.conv2, Structure.parse("1x1x3x3[a] * 3x3x1x1[a]; a=1"))
    data = TensorDataset(torch.randn(32, 3, 8, 8), torch.zeros(32, dtype=torch.long))
    config = FinetuneConfig(epochs=3, learning_rate=1e-2, layer_weight=8, label_weight=0)
    found = train(
        Distillation(teacher, TrainingData(data, 16), config, "kl"),
        replace_layers(teacher, {"conv2": conv}),
        tmp_path / "checkpoint",
    )
    assert found[-1]["loss"] < found[0]["loss"]


def test_layers_are_compared_over_their_channels() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv = nn.Linear(6, 5), nn.Conv2d(5, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.conv(self.linear(x).movedim(-1, 1))
            return out

    found: dict[str, tuple[int, ...]] = {}
    model = Net()
    with seen(model, ["linear", "conv"], lambda name, output: found.update({name: tuple(output.shape)})):
        model(torch.randn(2, 7, 3, 6))
    assert found == {"linear": (2 * 7 * 3, 5), "conv": (2, 4, 7, 3)}
    model(torch.randn(1, 2, 3, 6))
    assert found["conv"] == (2, 4, 7, 3)


@pytest.mark.parametrize(("scale", "how"), [(1.0, "frozen"), (30.0, "trained")])
def test_statistics_are_trained_where_a_network_starts_far_off(tmp_path: Path, scale: float, how: str) -> None:
    """Also in a training that is gone on with, and while the learning rate is looked for: from where it starts."""
    task = distillation(batch_norm="auto", epochs=2)
    start = copy_model(task.teacher)
    with torch.no_grad():
        start.get_parameter("linear.weight").mul_(scale)
    assert (task.distance(start) > FAR) == (how == "trained")
    assert task.settled(start).config.batch_norm == how
    assert tuned(task.with_rate(1e-3), start, tmp_path / "rate.json", Reporter()).config.batch_norm == how
    found = []
    for config in (task, distillation(batch_norm=how, epochs=2)):
        model, path = copy_model(start), tmp_path / f"{config.config.batch_norm}.pt"
        train(config, model, path, after_epoch=lambda row: row["epoch"] < 1)
        train(config, model := copy_model(start), path)
        found.append(model.state_dict())
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_batch_that_a_network_cannot_be_trained_on_is_named(tmp_path: Path) -> None:
    """A batch-norm has no statistics of a single value."""
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    loader: DataLoader[Any] = DataLoader(blobs(33), batch_size=16)
    config = FinetuneConfig(learning_rate=1e-2, batch_norm="trained")
    task = Distillation(teacher, TrainingData(loader, 16), config, "kl")
    with pytest.raises(DataError, match=r"cannot be trained on batch 3 of epoch 1: ValueError: Expected more than 1"):
        train(task, copy_model(teacher), tmp_path / "checkpoint.pt")
