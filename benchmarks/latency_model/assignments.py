"""Random assignments of structures to the layers of a network, from light to strong compression.

A network draws a level, its share of the dense flops, log-uniformly from LEVELS. One layer in five stays dense; every
other one draws a family and the rank whose flops are nearest below the level times a log-uniform factor from JITTER.
The first layer, of three input channels, stays dense. Factors are random and scaled to the weight they stand for: zeros
and denormal numbers would change timings.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn

from sekron_search.costs.analytic import layer_cost
from sekron_search.deployment import deploy
from sekron_search.inspection import inspect_model
from sekron_search.kron import families as fam
from sekron_search.kron.enumeration import largest_where
from sekron_search.kron.structure import Structure
from sekron_search.model import LayerInfo, layer_like, layer_weight, replace_layers

LEVELS = (0.1, 0.8)
JITTER = (0.6, 1.6)
DENSE_SHARE = 0.2
LARGEST_RANK = 2048


def random_networks(network: nn.Module, x: torch.Tensor, count: int, seed: int) -> dict[str, nn.Module]:
    """Deployed networks, by the level that they drew."""
    draw = random.Random(seed)
    infos = [info for info in inspect_model(network, x).layers if info.kind == "conv2d" and info.in_channels > 3]
    found = {}
    for number in range(count):
        level = _log_uniform(draw, LEVELS)
        layers = {}
        for info in infos:
            structure = _structure(draw, info, level * _log_uniform(draw, JITTER))
            if structure is not None:
                layers[info.name] = _random_layer(network, info, structure)
        # Deep networks of random weights may amplify rounding; that deploying is exact is tested elsewhere.
        found[f"{number}: level {level:.3f}"] = deploy(replace_layers(network, layers), x, tolerance=1e-2)
    return found


def _log_uniform(draw: random.Random, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return float(low * (high / low) ** draw.random())


def _structure(draw: random.Random, info: LayerInfo, share: float) -> Structure | None:
    """A structure of about that share of the dense flops; None where the layer stays dense."""
    shape, whole = info.weight_shape, layer_cost(fam.dense(info.weight_shape), info).flops
    f, c, *kernel = shape
    if draw.random() < DENSE_SHARE:
        return None
    slow, fast = draw.choice([n for n in (2, 4, 8, 16) if f % n == 0]), draw.choice([1, 2, 4])
    if max(kernel) == 1:
        makers: list[Callable[[int], Structure]] = [lambda rank: fam.channel_svd(shape, rank)]
    else:
        kernels = draw.choice([((kernel[0], 1), (1, kernel[1])), ((1, 1), tuple(kernel))])
        pair = [(slow, c // fast, *kernels[0]), (f // slow, fast, *kernels[1])]
        makers = [
            lambda rank: fam.channel_svd(shape, rank),
            lambda rank: fam.spatial_svd(shape, rank),
            lambda rank: fam.tucker2(shape, [min(rank, f), min(rank, c)]),
            lambda rank: fam.cp(shape, rank),
            lambda rank: fam.sekron(pair, [rank]),
        ]
    make = draw.choice(makers)

    def affordable(rank: int) -> bool:
        return layer_cost(make(rank), info).flops <= share * whole

    rank = largest_where(affordable, LARGEST_RANK)
    return make(rank) if rank >= 1 else None


def _random_layer(network: nn.Module, info: LayerInfo, structure: Structure) -> nn.Module:
    layer = layer_like(network, info.name, structure, input_size=info.input_size)
    layer.set_factors([torch.randn_like(factor) for factor in layer.factors()])
    scale = layer_weight(network, info).std() / layer.weight.detach().std()
    with torch.no_grad():
        for weight in layer.weights:
            weight.mul_(scale ** (1 / len(layer.weights)))
    return layer
