"""Draws the pictures of docs/structures.md: `python docs/pictures.py [FOLDER]`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

BLUE, ORANGE, GREY = "#4477aa", "#ee7733", "#666666"


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A white drawing area, an inch to a unit, y upward."""
    figure = plt.figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _matrix(axes: Axes, corner: tuple[float, float], values: np.ndarray, cell: float, colour: str) -> None:
    """Cells, as dark as the values in [0, 1]; the corner is the lower left one."""
    rows, columns = values.shape
    for (i, j), value in np.ndenumerate(values):
        place = (corner[0] + j * cell, corner[1] + (rows - 1 - i) * cell)
        axes.add_patch(Rectangle(place, cell, cell, facecolor=colour, alpha=float(value), edgecolor="none"))
    axes.add_patch(Rectangle(corner, columns * cell, rows * cell, facecolor="none", edgecolor=GREY, linewidth=1))


def _text(axes: Axes, x: float, y: float, text: str, size: float = 12, colour: str = "black") -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=colour)


A = np.array([[0.9, 0.35], [0.2, 0.65]])
B = np.array([[0.2, 0.9, 0.4], [0.8, 0.3, 1.0]])


def kronecker_product() -> Figure:
    """A matrix of copies of another one."""
    figure, axes = _canvas(7.2, 2.3)
    _matrix(axes, (0.3, 0.85), A, 0.35, BLUE)
    _text(axes, 1.3, 1.2, "⊗", 16)
    _matrix(axes, (1.6, 0.85), B, 0.35, ORANGE)
    _text(axes, 2.95, 1.2, "=", 16)
    whole = np.kron(A, B)
    _matrix(axes, (3.3, 0.5), whole, 0.35, "#224422")
    for x in (3.3 + 3 * 0.35,):
        axes.plot([x, x], [0.5, 1.9], color="white", linewidth=2)
    axes.plot([3.3, 5.4], [1.2, 1.2], color="white", linewidth=2)
    _text(axes, 0.65, 0.55, "A, 2 x 2", 10)
    _text(axes, 2.12, 0.55, "B, 2 x 3", 10)
    _text(axes, 4.35, 0.25, "4 x 6: every entry of A times the whole of B", 10)
    _text(axes, 6.35, 1.2, "10 numbers\nstand for 24", 10, GREY)
    return figure


def sum_of_products() -> Figure:
    """A weight as a sum over a rank index."""
    figure, axes = _canvas(7.6, 2.2)
    rng = np.random.default_rng(1)
    x = 0.2
    for term in range(3):
        first, second = rng.uniform(0.1, 1, (2, 2)), rng.uniform(0.1, 1, (2, 3))
        _matrix(axes, (x, 0.9), first, 0.25, BLUE)
        _text(axes, x + 0.65, 1.15, "⊗", 13)
        _matrix(axes, (x + 0.8, 0.9), second, 0.25, ORANGE)
        _text(axes, x + 0.8, 0.6, f"a = {term + 1}", 10)
        _text(axes, x + 1.75, 1.15, "+" if term < 2 else "=", 14)
        x += 1.95
    _matrix(axes, (x, 0.65), rng.uniform(0.1, 1, (4, 6)) ** 1.5, 0.22, "#224422")
    _text(axes, 3.6, 1.95, "W = sum over the rank index a of A[a] ⊗ B[a]", 11)
    _text(axes, 3.6, 0.2, "the more terms, the closer: with enough of them every W", 10, GREY)
    return figure


def low_rank() -> Figure:
    """The oldest special case."""
    figure, axes = _canvas(6.4, 2.4)
    rng = np.random.default_rng(2)
    _matrix(axes, (0.3, 0.5), rng.uniform(0.1, 0.9, (8, 6)), 0.2, "#224422")
    _text(axes, 1.75, 1.3, "=", 15)
    _matrix(axes, (2.0, 0.5), rng.uniform(0.1, 0.9, (8, 2)), 0.2, BLUE)
    _matrix(axes, (2.65, 1.6), rng.uniform(0.1, 0.9, (2, 6)), 0.2, ORANGE)
    _text(axes, 0.9, 0.25, "8 x 6", 10)
    _text(axes, 2.2, 0.25, "8 x 1 [a]", 10)
    _text(axes, 3.25, 1.4, "1 x 6 [a]", 10)
    _text(axes, 5.0, 1.3, "a column ⊗ a row\nis an outer product:\na sum of them is\na low-rank matrix", 10, GREY)
    return figure


#: Rank graphs: factors, and (index, the factors that carry it).
GRAPHS: dict[str, tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]] = {
    "SeKron": (3, (("a", (0, 1, 2)), ("b", (1, 2)))),
    "CP": (3, (("a", (0, 1, 2)),)),
    "Tensor-Train": (3, (("a", (0, 1)), ("b", (1, 2)))),
    "Tensor-Ring": (3, (("a", (0, 1)), ("b", (1, 2)), ("c", (2, 0)))),
    "Tucker": (4, (("a", (0, 3)), ("b", (1, 3)), ("c", (2, 3)))),
}


def rank_graphs() -> Figure:
    """Who shares which index, family by family."""
    figure, axes = _canvas(8.6, 2.5)
    for column, (name, (count, indices)) in enumerate(GRAPHS.items()):
        left = 0.85 + 1.73 * column
        angles = np.pi / 2 - 2 * np.pi * np.arange(min(count, 3)) / 3
        points = [(left + 0.5 * np.cos(t), 1.15 + 0.5 * np.sin(t)) for t in angles]
        points += [(left, 1.15)] * (count - 3)
        for index, carriers in indices:
            _index(axes, index, [points[k] for k in carriers])
        for k, (x, y) in enumerate(points):
            axes.plot([x], [y], marker="o", markersize=20, color=BLUE, zorder=3)
            axes.text(x, y, f"A{k + 1}", ha="center", va="center", color="white", fontsize=9, zorder=4)
        _text(axes, left, 2.3, name, 11)
    _text(
        axes,
        4.3,
        0.15,
        "a circle is a factor, a line an index that its ends share; a dot joins more than two",
        10,
        GREY,
    )
    return figure


def _index(axes: Axes, name: str, ends: Sequence[tuple[float, float]]) -> None:
    """A line between two factors, or a dot with a line to each of several."""
    middle = np.mean(ends, axis=0)
    for x, y in ends:
        axes.plot([middle[0], x], [middle[1], y], color=ORANGE, linewidth=2, zorder=1)
    if len(ends) > 2:
        axes.plot([middle[0]], [middle[1]], marker="o", markersize=6, color=ORANGE, zorder=2)
    side = (0.1, 0.12) if len(ends) > 2 else (0.13 * np.sign(middle[1] - 0.9), 0.1)
    axes.text(middle[0] + side[0], middle[1] + side[1], name, color=ORANGE, fontsize=11, ha="center", va="center")


#: Chains of 32x16x3x3: (channels, then kernel and channels of every convolution).
CHAINS: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...] = (
    ("dense", (16, 32), ("3x3",)),
    ("channel SVD, a=8", (16, 8, 32), ("3x3", "1x1")),
    ("spatial SVD, a=12", (16, 12, 32), ("1x3", "3x1")),
    ("Tucker-2, a=12, b=8", (16, 8, 12, 32), ("1x1", "3x3", "1x1")),
)


def chains() -> Figure:
    """What a structure runs as."""
    figure, axes = _canvas(7.6, 4.3)
    for row, (name, channels, kernels) in enumerate(CHAINS):
        y = 3.75 - 1.0 * row
        axes.text(0.1, y, name, fontsize=11, va="center")
        for place, count in enumerate(channels):
            x, height = 2.4 + 1.6 * place, 0.12 + 0.015 * count
            axes.add_patch(Rectangle((x - 0.12, y - height / 2), 0.24, height, facecolor=BLUE, edgecolor="none"))
            _text(axes, x, y - height / 2 - 0.11, f"{count}", 9)
            if place:
                arrow = FancyArrowPatch((x - 1.4, y), (x - 0.18, y), arrowstyle="-|>", mutation_scale=10, color=ORANGE)
                axes.add_patch(arrow)
                _text(axes, x - 0.8, y + 0.16, kernels[place - 1], 10, ORANGE)
    _text(axes, 3.8, 0.12, "bars are channels, arrows convolutions with their kernels", 10, GREY)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "kronecker_product": kronecker_product,
    "sum_of_products": sum_of_products,
    "low_rank": low_rank,
    "rank_graphs": rank_graphs,
    "chains": chains,
}


def main(folder: Path) -> None:
    """Draw all of them; the same bytes every time."""
    with mpl.rc_context({"svg.hashsalt": "sekron", "svg.fonttype": "none", "font.family": "sans-serif"}):
        for name, draw in PICTURES.items():
            figure = draw()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
