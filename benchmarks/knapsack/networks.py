"""Tables as large as ResNet-50's, drawn from a seed: 53 convolutions of its shapes, 200 options each."""

from __future__ import annotations

import numpy as np

from sekron_search.search.options import LayerTable, Network, Option
from sekron_search.search.pareto import non_dominated

#: (out-channels, in-channels, kernel, side of the output, how often) of ResNet-50's convolutions.
SHAPES = (
    (64, 3, 7, 112, 1),
    (64, 64, 1, 56, 1),
    (64, 64, 3, 56, 3),
    (256, 64, 1, 56, 4),
    (64, 256, 1, 56, 2),
    (128, 256, 1, 56, 1),
    (128, 128, 3, 28, 4),
    (512, 128, 1, 28, 4),
    (512, 256, 1, 28, 1),
    (128, 512, 1, 28, 3),
    (256, 512, 1, 28, 1),
    (256, 256, 3, 14, 6),
    (1024, 256, 1, 14, 6),
    (1024, 512, 1, 14, 1),
    (256, 1024, 1, 14, 5),
    (512, 1024, 1, 14, 1),
    (512, 512, 3, 7, 3),
    (2048, 512, 1, 7, 3),
    (2048, 1024, 1, 7, 1),
    (512, 2048, 1, 7, 2),
)


def resnet50_tables(seed: int, num_options: int = 200) -> Network:
    """Tables in which flops, parameters and latency go together, but not closely, and errors fall with all of them.

    Args:
        seed: Of everything that is drawn.
        num_options: Per layer, none of which another one beats.
    """
    rng = np.random.default_rng(seed)
    shapes = [shape for *shape, count in SHAPES for _ in range(count)]
    tables = []
    for number, (filters, channels, kernel, side) in enumerate(shapes):
        params = filters * channels * kernel**2
        tables.append(_table(f"conv{number}", params, params * side**2, num_options, rng))
    totals = {name: sum(float(t.options[0].cost(name)) for t in tables) for name in ("flops", "params", "latency_ms")}
    original = {
        "flops": 1.01 * totals["flops"],
        "params": 1.1 * totals["params"],
        "latency_ms": 1.2 * totals["latency_ms"],
    }
    return Network(tuple(tables), {**original, "peak_activation_bytes": 1.0})


def _table(name: str, params: int, flops: int, num_options: int, rng: np.random.Generator) -> LayerTable:
    """A layer's options: the better an option is for its costs, the likelier it is among those drawn."""
    latency_ms = flops / 2e7 * rng.lognormal(0, 0.3) + 0.05
    sensitivity, steepness = rng.lognormal(0, 0.8), rng.uniform(2.0, 6.0)
    kept: list[int] = []
    drawn = 4 * num_options
    while len(kept) < num_options:
        level = rng.uniform(0.02, 0.95, drawn)
        shares = level[:, None] ** [1.0, 1.0, 0.7] * rng.lognormal(0, [0.25, 0.35, 0.2], (drawn, 3))
        capacity = np.exp(np.log(shares).mean(1))
        errors = np.exp(-steepness * capacity / 2) * rng.lognormal(0, 0.1, drawn)
        values = np.column_stack([np.minimum(errors, 1.0), shares])
        kept = [int(i) for i in np.flatnonzero(non_dominated(values) & (shares < 1).all(1))]
        drawn *= 2
    chosen = sorted(rng.choice(kept, num_options - 1, replace=False).tolist())
    rows = [(1.0, 1.0, 1.0, 0.0), *((*shares[i], values[i, 0]) for i in chosen)]
    options = tuple(
        Option(
            structure=f"option {k}",
            family="Kronecker" if k else "dense",
            schedule="0",
            execution="factored",
            flops=int(f * flops),
            params=int(p * params),
            peak_bytes=0,
            weight_error=float(error),
            error=float(error),
            latency_ms=float(ms * latency_ms),
        )
        for k, (f, p, ms, error) in enumerate(rows)
    )
    return LayerTable(name, options, sensitivity=float(sensitivity))
