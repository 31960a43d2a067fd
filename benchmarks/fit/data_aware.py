"""Data-aware against weight-only fits of ResNet-20, judged on images that neither of them has seen."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks.cifar10.config import archive_of, resnet20_weights
from benchmarks.cifar10.data import cifar10
from benchmarks.cifar10.resnet import ResNet20
from sekron_search.calibration import collect_metrics
from sekron_search.inspection import inspect_model
from sekron_search.kron import families as fam
from sekron_search.kron.enumeration import FamilyName, Skeleton, largest_where, skeletons
from sekron_search.kron.families import family
from sekron_search.kron.metric import InputMetric
from sekron_search.kron.projection import project, reconstruct_batch
from sekron_search.kron.refine import refine
from sekron_search.kron.structure import Structure
from sekron_search.model import LayerInfo, layer_weight

FAMILIES: tuple[FamilyName, ...] = (
    "channel_svd",
    "spatial_svd",
    "tucker2",
    "cp",
    "tt",
    "tr",
    "sekron",
    "kronecker_cp",
    "kronecker_tt",
)
SHARES = (0.5, 0.25)
KRONECKER = 3
SAMPLES = 2048
HELD_OUT = 1024


def structures(info: LayerInfo) -> list[Structure]:
    """Of every family at half and a quarter of the parameters; of those with free shapes a few, spread over them."""
    dense = fam.dense(info.weight_shape).num_params
    found = []
    for name in FAMILIES:
        every = list(skeletons(name, info.weight_shape, 3, 1))
        positions = torch.linspace(0, len(every) - 1, min(KRONECKER, len(every))).round().int().tolist()
        found += [_of_size(every[i], share * dense) for i in positions for share in SHARES]
    return list(dict.fromkeys(structure for structure in found if structure is not None))


def _of_size(skeleton: Skeleton, most_params: float) -> Structure | None:
    """The largest structure of at most so many parameters, ranks in the proportion of their largest useful sizes."""

    def at(part: int) -> Structure:
        return skeleton.with_ranks([max(round(top * part / 256), 1) for top in skeleton.max_ranks()])

    part = largest_where(lambda part: at(part).num_params <= most_params, 256)
    return at(part) if part else None


def images(data: Path) -> Tensor:
    """Training images in a fixed random order."""
    train = cifar10(str(archive_of(data).resolve())).train
    assert isinstance(train, TensorDataset)
    pixels = train.tensors[0]
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order[: SAMPLES + HELD_OUT]]


def compare(data: Path) -> dict[str, Any]:
    """Held-out relative output errors of both fits, for every layer and structure."""
    model = ResNet20().eval()
    model.load_state_dict(torch.load(resnet20_weights(data), weights_only=True))
    batches = [(batch,) for batch in images(data).split(128)]
    layers = inspect_model(model, batches[0]).layers
    own = collect_metrics(model, layers, batches[: SAMPLES // 128])
    other = collect_metrics(model, layers, batches[SAMPLES // 128 :], damping=0.0)  # the judge sees the data alone
    pairs = []
    for info in layers:
        weight = layer_weight(model, info).double()
        for structure in structures(info):
            pairs.append({"layer": info.name, **_pair(structure, weight, own[info.name], other[info.name])})
        done = [p for p in pairs if p["layer"] == info.name]
        print(f"{info.name}: data-aware lower for {sum(p['data_aware'] < p['weight_only'] for p in done)}/{len(done)}")
    lower = [pair["data_aware"] < pair["weight_only"] for pair in pairs]
    return {
        "pairs": pairs,
        "share_lower": sum(lower) / len(lower),
        "mean_ratio": statistics.mean(pair["data_aware"] / pair["weight_only"] for pair in pairs),
    }


def _pair(structure: Structure, weight: Tensor, own: InputMetric, other: InputMetric) -> dict[str, Any]:
    plain = project(weight, structure, sweeps=50, starts=3)
    aware = refine(structure, plain, weight, own, steps=60)
    return {
        "structure": str(structure),
        "family": family(structure),
        "weight_only": other.rel_error(weight, reconstruct_batch(structure, plain.factors)),
        "data_aware": other.rel_error(weight, reconstruct_batch(structure, aware.factors)),
    }
