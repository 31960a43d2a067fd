"""The one structure type: factor shapes, rank sizes, and which rank indices each factor carries."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from math import prod

import opt_einsum
from torch import Tensor

from sekron_search.errors import StructureError
from sekron_search.kron.contraction import contraction

#: (f, c, *kernel): out-channels, in-channels, and two kernel sizes or three.
Shape = tuple[int, ...]

#: A size: no tensor has one of more digits.
_SIZE = "[0-9]{1,12}"
_FACTOR = re.compile(rf"\s*({_SIZE}(?:\s*x\s*{_SIZE})*)\s*(?:\[([^\[\]]*)\])?\s*")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_SYNTAX = "expected e.g. '16x1x3x1[a] * 1x16x1x3[a]; a=6'"


@dataclass(frozen=True)
class Structure:
    """A sequence of Kronecker factors that share rank indices.

    W = sum over the rank indices of A_1 (x) ... (x) A_S, the first factor slowest in every mode.

    Args:
        shapes: (f_k, c_k, h_k, w_k) of every factor, or (f_k, c_k, d_k, h_k, w_k) of a 3-d convolution's, all at
            least 1.
        carries: For every factor, the rank indices it carries, in the order of `ranks`.
        ranks: (name, size) of every rank index, sizes at least 1. Every index is carried by two factors or more:
            a sum that one factor does alone is no structure.

    Raises:
        StructureError: If one of these conditions does not hold.

    Source: SeKron, Hameed et al. 2022 (arXiv 2210.06299), Eq. 3, generalised to any rank graph.
    """

    shapes: tuple[Shape, ...]
    carries: tuple[tuple[str, ...], ...]
    ranks: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.shapes or len(self.shapes) != len(self.carries):
            raise StructureError(
                f"a structure needs one list of rank indices per factor, got {len(self.shapes)} factor shapes "
                f"and {len(self.carries)} lists"
            )
        for k, shape in enumerate(self.shapes):
            if len(shape) not in (4, 5) or any(not isinstance(n, int) or n < 1 for n in shape):
                raise StructureError(
                    f"factor {k + 1}: expected four sizes (f, c, *kernel), or five (f, c, d, h, w), "
                    f"of at least 1, got {shape}"
                )
            if len(shape) != len(self.shapes[0]):
                raise StructureError(
                    f"factor {k + 1}: expected {len(self.shapes[0])} sizes, as many as factor 1 has, got {shape}"
                )
        names = [name for name, _ in self.ranks]
        if len(set(names)) != len(names):
            raise StructureError(f"rank indices must have distinct names, got {names}")
        for name, size in self.ranks:
            if not _NAME.fullmatch(name):
                raise StructureError(f"rank index {name!r}: expected a letter, then letters, digits or '_'")
            if not isinstance(size, int) or size < 1:
                raise StructureError(f"rank index {name!r}: expected a size of at least 1, got {size}")
            if sum(name in carried for carried in self.carries) < 2:
                raise StructureError(f"rank index {name!r} must be carried by at least two factors")
        for k, carried in enumerate(self.carries):
            if unknown := [name for name in carried if name not in names]:
                raise StructureError(f"factor {k + 1}: rank indices {unknown} have no size; known: {names}")
            if list(carried) != [name for name in names if name in carried]:
                raise StructureError(
                    f"factor {k + 1}: expected distinct rank indices in the order {names}, got {carried}"
                )

    @classmethod
    def build(
        cls, shapes: Sequence[Sequence[int]], carries: Sequence[Sequence[str]], ranks: Mapping[str, int]
    ) -> Structure:
        """The structure of these parts, the rank indices put into the order of `ranks`."""
        ordered = tuple(tuple(sorted(carried, key=_position(ranks))) for carried in carries)
        return cls(tuple(tuple(s) for s in shapes), ordered, tuple(ranks.items()))

    @classmethod
    def parse(cls, text: str) -> Structure:
        """The structure that `text` describes; `Structure.parse(str(s)) == s`.

        Args:
            text: Factors `FxCxHxW[rank indices]` (`FxCxDxHxW[...]` for a 3-d kernel) joined by `*`, then the rank
                sizes: `16x1x3x1[a] * 1x16x1x3[a]; a=6`.

        Raises:
            StructureError: If the text does not follow this form.
        """
        head, _, tail = text.partition(";")
        shapes, carries = [], []
        for part in head.split("*"):
            match = _FACTOR.fullmatch(part)
            if match is None:
                raise StructureError(f"cannot read factor {part.strip()!r} of structure {text!r}: {_SYNTAX}")
            shapes.append(tuple(int(n) for n in match[1].split("x")))
            carries.append([name.strip() for name in match[2].split(",")] if match[2] and match[2].strip() else [])
        ranks: dict[str, int] = {}
        for item in tail.split(",") if tail.strip() else []:
            name, equals, size = (piece.strip() for piece in item.partition("="))
            if not equals or not re.fullmatch(_SIZE, size) or name in ranks:
                raise StructureError(f"cannot read rank {item.strip()!r} of structure {text!r}: {_SYNTAX}")
            ranks[name] = int(size)
        try:
            return cls.build(shapes, carries, ranks)
        except StructureError as error:
            raise StructureError(f"structure {text!r}: {error}") from None

    def __str__(self) -> str:
        factors = (
            "x".join(map(str, shape)) + (f"[{','.join(carried)}]" if carried else "")
            for shape, carried in zip(self.shapes, self.carries, strict=True)
        )
        sizes = ", ".join(f"{name}={size}" for name, size in self.ranks)
        return " * ".join(factors) + (f"; {sizes}" if sizes else "")

    @property
    def num_factors(self) -> int:
        """S, the length of the sequence."""
        return len(self.shapes)

    @property
    def is_dense(self) -> bool:
        """Whether this is the one-factor structure: the weight itself."""
        return self.num_factors == 1

    @cached_property
    def is_tree(self) -> bool:
        """Whether every rank index joins two factors and no chain of them closes (Tensor-Train, Tucker).

        The weights that such a structure represents are a closed set, so a best fit exists. Others (CP, rings, SeKron)
        may approach a weight with terms that grow without bound and cancel.

        Source: Landsberg, Qi and Ye 2012; de Silva and Lim 2008.
        """
        pairs = [[k for k, carried in enumerate(self.carries) if name in carried] for name, _ in self.ranks]
        component = list(range(self.num_factors))
        for carriers in pairs:
            if len(carriers) != 2 or component[carriers[0]] == component[carriers[1]]:
                return False
            old, new = component[carriers[0]], component[carriers[1]]
            component = [new if c == old else c for c in component]
        return True

    @cached_property
    def weight_shape(self) -> Shape:
        """(F, C, *kernel) of the weight that the structure reconstructs."""
        return tuple(prod(sizes) for sizes in zip(*self.shapes, strict=True))

    @property
    def kernel(self) -> tuple[int, ...]:
        """(Kh, Kw) or (Kd, Kh, Kw)."""
        return self.weight_shape[2:]

    @cached_property
    def rank_sizes(self) -> dict[str, int]:
        """Size of every rank index."""
        return dict(self.ranks)

    @property
    def largest_rank(self) -> int:
        """Size of the largest rank index, 1 without any."""
        return max(self.rank_sizes.values(), default=1)

    @cached_property
    def graph(self) -> tuple[tuple[str, ...], ...]:
        """What every factor carries, the rank indices called a, b, ... in their order, whatever their names."""
        names = {name: opt_einsum.get_symbol(i) for i, (name, _) in enumerate(self.ranks)}
        return tuple(tuple(names[name] for name in carried) for carried in self.carries)

    @cached_property
    def factor_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of every factor A_k: its rank indices first, then (f_k, c_k, *kernel_k)."""
        return tuple(
            tuple(self.rank_sizes[name] for name in carried) + shape
            for shape, carried in zip(self.shapes, self.carries, strict=True)
        )

    @cached_property
    def num_params(self) -> int:
        """Number of entries of all factors together."""
        return sum(prod(shape) for shape in self.factor_shapes)

    def check_factors(self, factors: Sequence[Tensor], *, batched: bool = False) -> None:
        """Raise a `StructureError` unless the factors have the structure's shapes (after a batch axis if `batched`)."""
        shapes = [tuple(a.shape[1:] if batched else a.shape) for a in factors]
        if shapes != list(self.factor_shapes):
            raise StructureError(f"structure {self}: expected factors of shapes {self.factor_shapes}, got {shapes}")

    def reconstruct(self, factors: Sequence[Tensor]) -> Tensor:
        """The weight W = sum over the rank indices of A_1 (x) ... (x) A_S.

        Args:
            factors: Tensors of the shapes `factor_shapes`.

        Returns:
            Tensor of shape `weight_shape`.

        Raises:
            StructureError: If the factors have other shapes.
        """
        self.check_factors(factors)
        return self.fold(self.contract([factor[None] for factor in factors])[0])

    def contract(self, factors: Sequence[Tensor]) -> Tensor:
        """Weights as tensors of one mode per factor, of shape (B, m_1, ..., m_S) with m_k the size of factor k.

        In this form the sequence of Kronecker products is a tensor network with a mode for every factor.

        Args:
            factors: (B, rank indices, f_k, c_k, *kernel_k), or with the last sizes flattened to m_k.
        """
        letters = map(opt_einsum.get_symbol, count())
        batch, *names = islice(letters, 1 + len(self.ranks))
        letter = dict(zip((name for name, _ in self.ranks), names, strict=True))
        modes = list(islice(letters, self.num_factors))
        inputs = tuple(
            batch + "".join(letter[n] for n in carried) + mode
            for carried, mode in zip(self.carries, modes, strict=True)
        )
        sizes = [(batch, factors[0].shape[0]), *((letter[name], size) for name, size in self.ranks)]
        sizes += [(mode, prod(shape)) for mode, shape in zip(modes, self.shapes, strict=True)]
        flat = [a.flatten(1 + len(carried)) for a, carried in zip(factors, self.carries, strict=True)]
        return contraction(inputs, batch + "".join(modes), tuple(sizes))(flat)

    def fold(self, modes: Tensor) -> Tensor:
        """From (..., m_1, ..., m_S) to (..., F, C, *kernel); inverse of `unfold`."""
        count, sizes = self.num_factors, len(self.weight_shape)
        lead = modes.shape[: modes.dim() - count]
        start = len(lead)
        axes = [*range(start), *(start + sizes * k + mode for mode in range(sizes) for k in range(count))]
        return (
            modes.reshape(*lead, *(n for s in self.shapes for n in s)).permute(axes).reshape(*lead, *self.weight_shape)
        )

    def unfold(self, weight: Tensor) -> Tensor:
        """From (..., F, C, *kernel) to (..., m_1, ..., m_S): the Van Loan-Pitsianis rearrangement for S factors."""
        count, sizes = self.num_factors, len(self.weight_shape)
        lead = weight.shape[: weight.dim() - sizes]
        start = len(lead)
        axes = [*range(start), *(start + mode * count + k for k in range(count) for mode in range(sizes))]
        split = [s[mode] for mode in range(sizes) for s in self.shapes]
        return weight.reshape(*lead, *split).permute(axes).reshape(*lead, *(prod(s) for s in self.shapes))


def rank_names(count: int) -> list[str]:
    """The first `count` default names of rank indices: a, b, ..."""
    if count > len(string.ascii_lowercase):
        raise StructureError(
            f"at most {len(string.ascii_lowercase)} rank indices have default names, asked for {count}"
        )
    return list(string.ascii_lowercase[:count])


def _position(ranks: Mapping[str, int]) -> Callable[[str], int]:
    order = {name: i for i, name in enumerate(ranks)}
    return lambda name: order.get(name, len(order))
