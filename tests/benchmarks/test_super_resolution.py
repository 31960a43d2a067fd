"""Networks from images to larger images, through the same run as classifiers: PSNR, absolute errors, pixel shuffle."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import sekron_search
from benchmarks.super_resolution.config import archive_of, config_of
from benchmarks.super_resolution.data import Images, in_8_bits, luma_psnr, patches, read_images
from benchmarks.super_resolution.network import Edsr
from sekron_search.costs.traced import traced_flops
from sekron_search.files import read_json
from sekron_search.jobs import job_from_config
from sekron_search.model import kronecker_layers
from sekron_search.progress import Reporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.tensor_files import write_tensors

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def images_of(folder: Path) -> Path:
    """A folder of data with smooth images, of sizes that differ, one of them odd."""
    archive = archive_of(folder)
    archive.parent.mkdir(parents=True)
    generator = np.random.default_rng(0)
    with tarfile.open(archive, "w") as tar:
        for name, sizes in {"bsd100": [(72, 80), (80, 72)], "set14": [(41, 48), (40, 40)], "set5": [(48, 44)]}.items():
            for number, (height, width) in enumerate(sizes):
                small = Image.fromarray(generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
                content = io.BytesIO()
                small.resize((width, height), Image.Resampling.BICUBIC).save(content, "png")
                member = tarfile.TarInfo(f"{name}/{number}.png")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)
    return folder


def trained(data: Path) -> Edsr:
    """A small network, trained just enough for its images to mean something."""
    torch.manual_seed(0)
    network = Edsr(0.25, 1)
    small, large = patches(read_images(archive_of(data))["bsd100"], seed=0).tensors
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.l1_loss(network(small[:16]), large[:16]).backward()
        optimizer.step()
    return network


def test_super_resolution_is_compressed_by_the_same_run(tmp_path: Path) -> None:
    data, weights = images_of(tmp_path / "data"), tmp_path / "edsr.safetensors"
    original = trained(data)
    write_tensors(weights, dict(original.state_dict()))
    config = config_of(
        data,
        weights=weights,
        budget={"flops": "0.5x"},
        calibration={"samples": 16, "holdout": 8, "batch_size": 8, "refine_steps": 5, "sequential_steps": 10},
        search={"trials": 4, "divergence": "mse"},
        finetune={"epochs": 2, "candidates": 1, "batch_size": 8, "loss": "l1", "label_weight": 0.5},
    )
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"kwargs": {"width": 0.25, "blocks": 1}})}
    )
    folder = RunFolder(tmp_path / "run")
    report = run(job_from_config(config), folder, Reporter(), resume=False)
    network, images = sekron_search.load(folder.path), read_images(archive_of(data))
    assert kronecker_layers(network)
    assert report["metric_name"] == "luma_psnr"
    assert report["original"]["metric"] == pytest.approx(luma_psnr(original.eval(), Images(images["set5"])))
    assert report["compressed"]["metric"] == pytest.approx(luma_psnr(network, Images(images["set5"])))
    assert report["compressed"]["metric"] > report["original"]["metric"] - 2
    assert report["compressed"]["flops"] <= 0.5 * report["original"]["flops"]
    assert traced_flops(network, torch.rand(1, 3, 32, 32)).total == report["compressed"]["flops"]
    assert network(torch.rand(2, 3, 10, 12)).shape == (2, 3, 20, 24)
    curve = read_json(folder.path / "report.json")["curve"]
    assert [row["epoch"] for row in curve] == [1, 2]
    assert curve[1]["loss"] < curve[0]["loss"]
    if report["as_fitted"]:
        assert report["compressed"]["metric"] == report["metric_without_training"]
    else:
        assert curve[-1]["metric"] == pytest.approx(luma_psnr(network, Images(images["set14"])), abs=0.01)


def test_the_metric_is_of_luma_without_a_border_in_8_bits() -> None:
    class Shifted(nn.Module):
        """Twice the size, brighter by 4 of 255 inside; what it does at the border must not count."""

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(4.2 / 255))  # rounded to 4

        def forward(self, x: Tensor) -> Tensor:
            out = F.interpolate(x, scale_factor=2) + self.shift
            out[:, :, :2], out[:, :, -2:], out[..., :2], out[..., -2:] = 0, 1, 0, 1
            return out

    flat = [in_8_bits(torch.full((3, 20, 24), value)) for value in (0.25, 0.5)]
    # Luma of a grey image: (65.481 + 128.553 + 24.966) / 255 of its value, and 16 / 255.
    expected = 20 * np.log10(255 / (4 * 219 / 255))
    assert luma_psnr(Shifted(), Images(flat)) == pytest.approx(expected, abs=1e-3)
