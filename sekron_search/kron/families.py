"""Constructors of the families. They differ only in factor shapes and rank graph, so they build one type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Literal

from sekron_search.errors import StructureError
from sekron_search.kron.structure import Shape, Structure, rank_names

Graph = tuple[tuple[str, ...], ...]


def nested_graph(count: int) -> Graph:
    """Rank graph of SeKron: factor k carries r_1..r_k, the last one r_1..r_{S-1}."""
    names = rank_names(count - 1)
    return tuple(tuple(names[: k + 1]) for k in range(count - 1)) + (tuple(names),)


def cp_graph(count: int) -> Graph:
    """Rank graph of CP: one index that every factor carries."""
    return (("a",),) * count


def tt_graph(count: int) -> Graph:
    """Rank graph of Tensor-Train: neighbours share an index."""
    names = rank_names(count - 1)
    return tuple(tuple(names[max(k - 1, 0) : k + 1]) for k in range(count))


def tr_graph(count: int) -> Graph:
    """Rank graph of Tensor-Ring: Tensor-Train closed by one more index between the last and the first factor."""
    names = rank_names(count)
    return ((names[0], names[-1]),) + tuple((names[k - 1], names[k]) for k in range(1, count))


def tucker_graph(count: int) -> Graph:
    """Rank graph of Tucker: one index per factor, and a core, the last factor, that carries them all."""
    names = rank_names(count - 1)
    return tuple((name,) for name in names) + (tuple(names),)


GraphName = Literal["sekron", "cp", "tt", "tr", "tucker"]

#: Rank graphs by name, as functions of the number of factors S >= 2. Tensor-Ring needs S >= 3 to differ from S = 2 CP.
GRAPHS: dict[GraphName, Callable[[int], Graph]] = {
    "sekron": nested_graph,
    "cp": cp_graph,
    "tt": tt_graph,
    "tr": tr_graph,
    "tucker": tucker_graph,
}


def dense(weight_shape: Sequence[int]) -> Structure:
    """One factor, no rank index: the weight itself."""
    return Structure.build([weight_shape], [()], {})


def kronecker(shapes: Sequence[Sequence[int]], graph: GraphName, ranks: Sequence[int]) -> Structure:
    """The structure of these factor shapes with a named rank graph (Kronecker-CP, -TT, -TR, -Tucker or SeKron).

    Args:
        shapes: (f_k, c_k, *kernel_k) of each of the S >= 2 factors.
        graph: Name of the rank graph, a key of `GRAPHS`.
        ranks: Size of every rank index of the graph: S - 1 for SeKron, TT and Tucker, S for TR, one for CP.

    Raises:
        StructureError: If the number of factors or of ranks does not fit the graph.
    """
    least = 3 if graph == "tr" else 2
    if len(shapes) < least:
        raise StructureError(f"the {graph} graph needs at least {least} factors, got {len(shapes)}")
    carries = GRAPHS[graph](len(shapes))
    names = sorted({name for carried in carries for name in carried})
    if len(ranks) != len(names):
        raise StructureError(f"the {graph} graph of {len(shapes)} factors needs {len(names)} ranks, got {tuple(ranks)}")
    return Structure.build(shapes, carries, dict(zip(names, ranks, strict=True)))


def sekron(shapes: Sequence[Sequence[int]], ranks: Sequence[int]) -> Structure:
    """SeKron: any factor shapes, nested ranks r_1..r_{S-1} (Hameed et al. 2022, Eq. 3)."""
    return kronecker(shapes, "sekron", ranks)


def mode_shapes(weight_shape: Sequence[int]) -> list[Shape]:
    """One factor per mode that is larger than 1: (F,1,1,1), (1,C,1,1), (1,1,Kh,1), (1,1,1,Kw)."""
    shapes: list[Shape] = []
    for mode, size in enumerate(weight_shape):
        if size > 1:
            shapes.append(tuple(size if i == mode else 1 for i in range(len(weight_shape))))
    return shapes


def cp(weight_shape: Sequence[int], rank: int) -> Structure:
    """CP over the modes larger than 1: sum of `rank` outer products (Lebedev et al. 2015)."""
    return kronecker(mode_shapes(weight_shape), "cp", [rank])


def depthwise_cp(weight_shape: Sequence[int], rank: int) -> Structure:
    """CP over out-channels, in-channels and the whole kernel: a pointwise, a depthwise and a pointwise convolution.

    For kernels of one axis larger than 1 it is CP.

    Source: Astrid and Lee 2017, CP-decomposition with tensor power method for convolutional neural networks
    compression; Phan et al. 2020, Stable low-rank tensor decomposition for compression of convolutional neural network.
    """
    return kronecker(_depthwise_cp_shapes(weight_shape), "cp", [rank])


def tensor_train(weight_shape: Sequence[int], ranks: Sequence[int]) -> Structure:
    """Tensor-Train over the modes larger than 1, in the order F, C, *kernel (Oseledets 2011)."""
    return kronecker(mode_shapes(weight_shape), "tt", ranks)


def tensor_ring(weight_shape: Sequence[int], ranks: Sequence[int]) -> Structure:
    """Tensor-Ring over the modes larger than 1; the last rank closes the ring (Zhao et al. 2016)."""
    return kronecker(mode_shapes(weight_shape), "tr", ranks)


def tucker(weight_shape: Sequence[int], ranks: Sequence[int]) -> Structure:
    """Tucker over every mode larger than 1, one rank per mode, core of one entry per combination (Tucker 1966)."""
    return kronecker([*mode_shapes(weight_shape), (1,) * len(weight_shape)], "tucker", ranks)


def tucker2(weight_shape: Sequence[int], ranks: Sequence[int]) -> Structure:
    """Tucker-2: out- and in-channels are projected, the kernel stays in the core (Kim et al. 2016).

    Args:
        weight_shape: (F, C, *kernel).
        ranks: (rank of the out-channels, rank of the in-channels).
    """
    if len(ranks) != 2:
        raise StructureError(f"Tucker-2 needs two ranks (out-channels, in-channels), got {tuple(ranks)}")
    a, b = ranks
    return Structure.build(_tucker2_shapes(weight_shape), [("a",), ("a", "b"), ("b",)], {"a": a, "b": b})


def _tucker2_shapes(weight_shape: Sequence[int]) -> tuple[Shape, Shape, Shape]:
    f, c, *kernel = weight_shape
    ones = (1,) * len(kernel)
    return (f, 1, *ones), (1, 1, *kernel), (1, c, *ones)


def _depthwise_cp_shapes(weight_shape: Sequence[int]) -> tuple[Shape, Shape, Shape]:
    left, kernel, right = _tucker2_shapes(weight_shape)
    return left, right, kernel


def channel_svd(weight_shape: Sequence[int], rank: int) -> Structure:
    """(F,1,1,1)[a] * (1,C,Kh,Kw)[a]: a full convolution to `rank` channels, then a pointwise one."""
    f, c, *kernel = weight_shape
    return sekron([(f, 1, *[1] * len(kernel)), (1, c, *kernel)], [rank])


def spatial_svd(weight_shape: Sequence[int], rank: int) -> Structure:
    """(F,1,Kh,1)[a] * (1,C,1,Kw)[a]: a horizontal convolution, then a vertical one (Jaderberg et al. 2014).

    Of a 3-d kernel the first axis goes to the out-channels, the other two stay with the in-channels.
    """
    f, c, first, *others = weight_shape
    return sekron([(f, 1, first, *[1] * len(others)), (1, c, 1, *others)], [rank])


def family(structure: Structure) -> str:
    """The usual name of a structure's family, for reports."""
    count = structure.num_factors
    if count == 1:
        return "dense"
    single = all(sum(n > 1 for n in shape) <= 1 for shape in structure.shapes)
    if count == 2:
        return _pair_family(structure)
    if structure.shapes == _tucker2_shapes(structure.weight_shape) and structure.carries == tt_graph(3):
        return "Tucker-2"
    apart = sorted(structure.shapes) == sorted(_depthwise_cp_shapes(structure.weight_shape))  # in CP any order does
    if structure.graph == cp_graph(3) and apart and not single:
        return "depthwise CP"
    names: dict[GraphName, str] = {
        "cp": "CP",
        "tt": "Tensor-Train",
        "tr": "Tensor-Ring",
        "tucker": "Tucker",
        "sekron": "SeKron",
    }
    for graph, label in names.items():
        if structure.graph == GRAPHS[graph](count):
            core = graph == "tucker" and prod(structure.shapes[-1]) > 1
            return label if (single or graph == "sekron") and not core else f"Kronecker-{label}"
    return "Kronecker (mixed rank graph)"


def _pair_family(structure: Structure) -> str:
    """The usual name of a two-factor structure; factors that share no mode commute, so their order does not count."""
    first, second = structure.shapes
    if any(a > 1 and b > 1 for a, b in zip(first, second, strict=True)):
        return "Kronecker"
    # Which factor has each mode larger than 1: 0 or 1.
    homes = {mode: int(b > 1) for mode, (a, b) in enumerate(zip(first, second, strict=True)) if a * b > 1}
    channels = [home for mode, home in homes.items() if mode < 2]
    if len({home for mode, home in homes.items() if mode >= 2}) == 2:
        return "Kronecker" if channels in ([0, 0], [1, 1]) else "spatial SVD"
    return "channel SVD" if sorted(channels) == [0, 1] else "spatial basis"
