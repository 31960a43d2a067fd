"""Deployed and exported networks against the networks that they came from: every family, and ResNet-20 in int8.

    python -m benchmarks.exports --data DIR [--only families int8]

A small network with batch-norms, strides and a residual, its convolutions in every family, in the best schedule and in
one that is grouped and one that is folded as far as it goes; float32, two batch sizes. Then ResNet-20 on CIFAR-10
(JPEG), a run at half the flops without training, exported to ONNX with `--int8`: accuracy on the test split, dense and
compressed, in float32 and in int8. DIR holds data/cifar10_jpeg.tar.xz and models/resnet20_cifar10_jpeg.pt.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cifar10.config import config_of
from benchmarks.results_file import RESULTS, Target, samples_of, write_results
from sekron_search import deploy, export_network
from sekron_search.deployment import relative_difference
from sekron_search.jobs import job_from_config
from sekron_search.kron import families as fam
from sekron_search.kron.geometry import ConvGeometry
from sekron_search.kron.plan import good_plans
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from sekron_search.model import layer_like, replace_layers
from sekron_search.progress import ConsoleReporter
from sekron_search.run import run
from sekron_search.run_export import export_run
from sekron_search.rundir import RunFolder

SHAPE = (32, 32, 3, 3)

FAMILIES: dict[str, Structure] = {
    "channel SVD": fam.channel_svd(SHAPE, 12),
    "spatial SVD": fam.spatial_svd(SHAPE, 12),
    "spatial basis": fam.sekron([(32, 32, 1, 1), (1, 1, 3, 3)], [3]),
    "Kronecker": fam.sekron([(4, 4, 1, 1), (8, 8, 3, 3)], [3]),
    "SeKron S=3": fam.sekron([(4, 2, 1, 1), (4, 4, 3, 1), (2, 4, 1, 3)], [4, 3]),
    "SeKron S=4": fam.sekron([(4, 2, 1, 1), (2, 4, 3, 1), (2, 2, 1, 3), (2, 2, 1, 1)], [3, 3, 2]),
    "CP": fam.cp(SHAPE, 20),
    "Tucker": fam.tucker(SHAPE, [12, 12, 3, 3]),
    "Tucker-2": fam.tucker2(SHAPE, [12, 12]),
    "Tensor-Train": fam.tensor_train(SHAPE, [12, 6, 3]),
    "Tensor-Ring": fam.tensor_ring(SHAPE, [3, 4, 3, 3]),
    "Kronecker-CP": fam.kronecker([(4, 2, 3, 1), (4, 4, 1, 3), (2, 4, 1, 1)], "cp", [6]),
    "Kronecker-TT": fam.kronecker([(4, 2, 3, 1), (4, 4, 1, 3), (2, 4, 1, 1)], "tt", [4, 4]),
    "Kronecker-TR": fam.kronecker([(4, 2, 3, 1), (4, 4, 1, 3), (2, 4, 1, 1)], "tr", [2, 3, 2]),
    "Kronecker-Tucker": fam.kronecker([(4, 2, 3, 1), (4, 4, 1, 3), (2, 4, 1, 1)], "tucker", [4, 4]),
}


class Net(nn.Module):
    """Two convolutions that are replaced, one of them strided, in a small residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.first = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.norm(self.first(x)))
        logits: Tensor = self.head(F.relu(self.second(x)).mean((2, 3)))
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=["families", "int8"], default=["families", "int8"])
    parser.add_argument("--runs", type=Path, default=Path("runs/exports"))
    args = parser.parse_args()
    earlier = RESULTS / "exports.json"
    samples: dict[str, Any] = samples_of(earlier) if len(args.only) < 2 and earlier.exists() else {}
    if "families" in args.only:
        samples["families"] = [compare(name, structure) for name, structure in FAMILIES.items()]
    if "int8" in args.only:
        samples["int8"] = quantized(args.data, args.runs)
    write_results("exports", targets(samples), samples, command="make bench NAME=exports DATA=...")


def compare(name: str, structure: Structure) -> dict[str, Any]:
    """The largest differences of what is deployed and exported, relative to the largest output, over schedules."""
    row: dict[str, Any] = {"family": name, "structure": str(structure), "deploy": 0.0, "onnx": 0.0, "pt2": 0.0}
    for schedule in _schedules(structure):
        torch.manual_seed(0)
        model = Net()
        model(torch.randn(64, 3, 16, 16))  # so that the batch-norm has statistics
        model.eval()
        layers = {}
        for layer in ("first", "second"):
            layers[layer] = layer_like(model, layer, structure, schedule=schedule)
            layers[layer].set_factors([torch.randn_like(a) * a[0].numel() ** -0.25 for a in layers[layer].factors()])
        network, x = replace_layers(model, layers).eval(), torch.randn(4, 3, 16, 16)
        with torch.no_grad():
            plain = relative_difference([network(x)], [deploy(network, x)(x)])
        row["deploy"] = max(row["deploy"], plain)
        with tempfile.TemporaryDirectory() as folder:
            for form in ("onnx", "pt2"):
                written = export_network(network, x, Path(folder) / f"network.{form}", format=form)
                row[form] = max(row[form], written.rel_difference)
    print(row, flush=True)
    return row


def _schedules(structure: Structure) -> Iterator[Schedule]:
    plans = good_plans(structure, ConvGeometry(padding=((1, 1), (1, 1))), (16, 16))
    grouped = [plan.schedule for plan in plans if not plan.schedule.folded]
    yield from dict.fromkeys(
        [plans[0].schedule, grouped[0], Schedule(grouped[0].order, tuple(sorted(grouped[0].order)))]
    )


def quantized(data: Path, runs: Path) -> dict[str, Any]:
    """ResNet-20 at half the flops, untrained, beside the original, in float32 and int8."""
    config = config_of(data, budget={"flops": "0.5x"}, finetune={"epochs": 0, "candidates": 1}, search={"trials": 12})
    folder = RunFolder(runs / "resnet20-half")
    run(job_from_config(config), folder, ConsoleReporter(), resume=True)
    record = export_run(folder, ConsoleReporter(), format="onnx", int8=True)
    for network in record["networks"]:
        print(network, flush=True)
    return {"rel_difference": record["rel_difference"], "networks": record["networks"]}


def targets(samples: dict[str, Any]) -> list[Target]:
    """What was asked of exports."""
    found = []
    for form, bound in (("deploy", 1e-5), ("onnx", 1e-4), ("pt2", 1e-4)):
        if rows := samples.get("families"):
            worst = max(row[form] for row in rows)
            found.append(Target(f"{form}: largest relative difference over all families", worst, bound, at_least=False))
    if record := samples.get("int8"):
        difference = record["rel_difference"]
        found.append(Target("onnx: relative difference of ResNet-20", difference, 1e-4, at_least=False))
    return found


if __name__ == "__main__":
    main()
