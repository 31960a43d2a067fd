"""A teacher that has seen images from both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sekron_search.config import Config
from sekron_search.divergence import kl_divergence
from sekron_search.errors import DataError
from sekron_search.finetune import Distillation
from sekron_search.jobs import job_from_config
from sekron_search.mirrored import mean_with_mirrored
from sekron_search.model import copy_model
from sekron_search.prepare import checked_layers
from sekron_search.sections import FinetuneConfig
from sekron_search.training_data import TrainingData
from tests.cases import CONFIG, blobs, small_net, write_config


def test_outputs_of_whole_images_are_averaged() -> None:
    network, images = small_net(), blobs(8).tensors[0]
    both = mean_with_mirrored(network, (images,), network(images))
    assert torch.equal(both, (network(images) + network(images.flip(-1))) / 2)
    assert not both.requires_grad
    assert torch.equal(both, mean_with_mirrored(network, (images.flip(-1),), network(images.flip(-1))))


def test_images_that_come_out_are_mirrored_back() -> None:
    """A convolution with a kernel gives what one with the mean of the kernel and its mirror image gives."""
    torch.manual_seed(0)
    conv, even = (nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        even.weight.copy_((conv.weight + conv.weight.flip(-1)) / 2)
        even.bias.copy_(conv.bias)  # type: ignore[arg-type, union-attr]
    images = torch.rand(2, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(mean_with_mirrored(conv, (images,), conv(images)), even(images))


class Nested(nn.Module):
    """Takes images and numbers; gives images, numbers, and which is the largest."""

    def forward(self, images: Tensor, numbers: Tensor) -> dict[str, Any]:
        return {
            "image": images * 2,
            "sums": (images[..., 0].sum((1, 2)) + numbers, images.flatten(1).argmax(1)),
            "n": 3,
        }


def test_arguments_and_outputs_may_be_nested() -> None:
    images, numbers = torch.rand(2, 3, 4, 5), torch.rand(2)
    network = Nested()
    found = mean_with_mirrored(network, (images, numbers), network(images, numbers))
    assert torch.equal(found["image"], images * 2)
    ends = (images[..., 0].sum((1, 2)) + images[..., -1].sum((1, 2))) / 2
    torch.testing.assert_close(found["sums"][0], ends + numbers)
    assert torch.equal(found["sums"][1], images.flatten(1).argmax(1)), "no mean of class indices"
    assert found["n"] == 3


def test_what_is_no_image_is_told() -> None:
    says = r"^finetune\.mirrored_teacher: "
    with pytest.raises(DataError, match=says + r"expected images .* shapes \[\(2, 5\)\]; set it"):
        mean_with_mirrored(nn.Identity(), (torch.rand(2, 5),), torch.rand(2, 5))
    images = torch.rand(2, 3, 4, 5)
    for end, shape in (((2,), r"\(2, 3, 20\)"), ((0, -2), r"\(24, 5\)")):  # the latter are pixels, not whole images
        flatten = nn.Flatten(*end)
        with pytest.raises(DataError, match=says + "the network makes an output of shape " + shape):
            mean_with_mirrored(flatten, (images,), flatten(images))


class Selecting(nn.Module):
    """Gives a number for each image whose first column is bright."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [image.sum()[None] for image in images if image[..., 0].mean() > 0.5]


def test_outputs_that_hang_on_values_are_told() -> None:
    images = torch.zeros(2, 1, 4, 4)
    images[0, ..., 0] = 1
    images[:, ..., -1] = 1
    with pytest.raises(DataError, match=r"of shapes \[\(1,\)\], those for their mirror images of \[\(1,\), \(1,\)\]"):
        mean_with_mirrored(Selecting(), (images,), Selecting()(images))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_means_are_not_rounded(half: torch.dtype) -> None:
    images = torch.tensor([[[[1.0, 1.0 + torch.finfo(half).eps]]]], dtype=half)
    found = mean_with_mirrored(nn.Flatten(), (images,), images.flatten(1))
    assert found.dtype == torch.float32
    assert found.tolist() == [[1.0 + torch.finfo(half).eps / 2] * 2]
    large = torch.full((1, 1, 1, 2), 6e4, dtype=half)  # near the most that float16 holds
    assert mean_with_mirrored(nn.Flatten(), (large,), large.flatten(1)).isfinite().all()


def distillation(network: nn.Module, **options: Any) -> Distillation:
    config = FinetuneConfig(epochs=4, learning_rate=3e-3, label_weight=0.0, **options)
    return Distillation(network, TrainingData(blobs(256, seed=3), 32, seed=5), config, "kl")


def test_a_network_learns_the_mean_of_both_sides() -> None:
    """Though it begins as the original, which differs from its own mirror image."""
    original = small_net()
    images = blobs(256, seed=9).tensors[0]
    with torch.no_grad():
        wanted = mean_with_mirrored(original, (images,), original(images))
        apart = kl_divergence(original(images), wanted)
        found = {}
        for mirrored in (False, True):
            task, model = distillation(original, mirrored_teacher=mirrored), copy_model(original)
            with torch.enable_grad():
                task.train(
                    model,
                    checkpoint=None,
                    measure=None,
                    after_epoch=lambda *_: True,
                    progress=lambda _: None,
                )
            found[mirrored] = kl_divergence(model(images), wanted)
    assert found[True] < 0.3 * apart
    assert found[False] > 0.8 * apart


def test_layers_are_compared_on_the_images_as_they_are() -> None:
    """The error of a layer that is as the original's is 0, and the loss that of the outputs."""
    original = small_net()
    task = distillation(original, mirrored_teacher=True)
    assert "conv2" in task.references
    (images,), labels = next(task.data.epoch(1))
    wanted = mean_with_mirrored(original, (images,), original(images))
    alone, with_layers = (task._loss(original, replaced, 1e6, (images,), labels) for replaced in ([], ["conv2"]))
    torch.testing.assert_close(alone, with_layers)
    hot = task.config.temperature
    softened = nn.functional.kl_div(
        (original(images) / hot).log_softmax(1), (wanted / hot).log_softmax(1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(alone, hot**2 * softened)


@pytest.mark.parametrize("finetune", ["epochs: 1", "epochs: 0"])
def test_what_differs_from_side_to_side_is_refused_before_long_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finetune: str
) -> None:
    """Also where the audit alone trains networks."""
    text = CONFIG.replace("epochs: 2,", f"{finetune}, mirrored_teacher: true,") + "audit: {candidates: 6}\n"
    job = job_from_config(Config.load(write_config(tmp_path, text)))
    assert checked_layers(job).layers
    monkeypatch.setattr("sekron_search.mirrored.APART", 1e-6)
    says = r"^finetune\.mirrored_teacher: the network's outputs for images diverge by 0\.\d+ .* set it to false$"
    with pytest.raises(DataError, match=says):
        checked_layers(job)


def test_a_check_before_long_work_finds_data_without_images() -> None:
    network = nn.Sequential(nn.Linear(6, 4))
    data = torch.utils.data.TensorDataset(torch.rand(32, 6), torch.arange(32) % 4)
    task = Distillation(network, TrainingData(data, 16), FinetuneConfig(mirrored_teacher=True), "kl")
    with pytest.raises(DataError, match=r"finetune\.mirrored_teacher"):
        task.check()
