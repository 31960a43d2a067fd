"""A metric times a weight that is given by its factors: cheaper than times the weight where ranks are small."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import opt_einsum
from torch import Tensor

from sekron_search.kron.contraction import Contraction, contraction
from sekron_search.kron.metric import InputMetric
from sekron_search.kron.structure import Structure


class MetricProduct:
    """H W^ M from the factors of W^, in the cheapest order for each structure.

    With a factor of few channels f and ranks r the moment is contracted first: r f P^2 products instead of F P^2.

    Args:
        metric: Of the layer; computed in the dtype of its moment.
    """

    def __init__(self, metric: InputMetric) -> None:
        self.metric = metric
        self._layout: object = None
        self._laid_out: Tensor | None = None

    def cost(self, structure: Structure) -> float:
        """Multiply-adds of one product, about."""
        return self._planned(structure)[0].cost

    def __call__(self, structure: Structure, factors: Sequence[Tensor]) -> Tensor:
        """(G, F, P) from factors (G, rank indices, f, c, *kernel) of a structure whose channels are not padded."""
        moment, curvature = self.metric.moment, self.metric.curvature
        plan, shapes = self._planned(structure)
        layout = (shapes[0], plan.first_layout)
        if self._laid_out is None or layout != self._layout:
            # Structures of equal shapes follow one another: they share the copy.
            self._layout, self._laid_out = layout, plan.lay_out(moment.reshape(shapes[0]))
        others = [*([] if curvature is None else [curvature]), *factors]
        shaped = [a.to(moment).reshape(shape) for a, shape in zip(others, shapes[1:], strict=True)]
        product = plan([self._laid_out, *shaped], laid_out=True)
        return product.reshape(len(moment), -1, moment.shape[-1])

    def _planned(self, structure: Structure) -> tuple[Contraction, list[tuple[int, ...]]]:
        """The contraction of M, H if there is one, and the factors, and their shapes for it.

        Every index is split as the structure splits it; those of size 1 are left out.
        """
        letters = map(opt_einsum.get_symbol, count())
        batch, column = next(letters), next(letters)
        sizes = {batch: self.metric.moment.shape[0], column: self.metric.moment.shape[-1]}

        def named(size: int) -> str:
            letter: str = next(letters)
            sizes[letter] = size
            return letter

        ranks = {name: named(size) for name, size in structure.ranks}
        modes = [
            [named(shape[mode]) if shape[mode] > 1 else "" for shape in structure.shapes]
            for mode in range(len(structure.weight_shape))
        ]
        rows = "".join(modes[0])
        inputs = [batch + column + "".join(letter for mode in modes[1:] for letter in mode)]
        output = rows
        if self.metric.curvature is not None:
            output = named(structure.weight_shape[0])
            inputs.append(batch + output + rows)
        for k, carried in enumerate(structure.carries):
            inputs.append(batch + "".join(ranks[n] for n in carried) + "".join(mode[k] for mode in modes))
        shapes = [tuple(sizes[letter] for letter in letters_of) for letters_of in inputs]
        return contraction(tuple(inputs), batch + output + column, tuple(sorted(sizes.items()))), shapes
