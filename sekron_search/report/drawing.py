"""A drawing of a structure: factors as boxes in their order, rank indices as lines between those that share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from xml.etree import ElementTree as ET

from sekron_search.kron.structure import Structure

#: Pixels: of a letter, of a box, between boxes, from one line above the boxes to the next.
LETTER, BOX_HEIGHT, LEAST_BOX, GAP, LANE = 7.2, 46, 96, 64, 30
#: Between the sizes of a factor: a multiplication sign in thin spaces.
TIMES = "\u2009\u00d7\u2009"
#: A junction where a line meets one of three boxes or more.
DOT = 3


@dataclass(frozen=True)
class _Box:
    left: float
    width: float

    @property
    def right(self) -> float:
        return self.left + self.width


@dataclass(frozen=True)
class _Line:
    """A rank index above the boxes.

    Args:
        label: Its name and size.
        carriers: The factors that share it.
        lane: 0 is next to the boxes.
    """

    label: str
    carriers: tuple[int, ...]
    lane: int


def drawing(text: str) -> str:
    """A structure's text form as an SVG element to be put into a page, whose style sheet colours it.

    An index that two neighbours share is a line between them; every other one runs above the boxes, and comes down to
    each factor that carries it.

    Raises:
        StructureError: If the text is no structure.
    """
    structure = Structure.parse(text)
    direct, others = _sorted_indices(structure)
    lines = _lanes(others)
    boxes = _boxes(structure, [direct.get(k, "") for k in range(structure.num_factors - 1)], lines)
    top = 1 + (LANE * (1 + max(line.lane for line in lines)) if lines else 0)
    width, height = boxes[-1].right + 1, top + BOX_HEIGHT + 1
    svg = ET.Element(
        "svg",
        {
            "class": "drawing",
            "viewBox": f"0 0 {width:g} {height:g}",
            "width": f"{width:g}",
            "height": f"{height:g}",
            "role": "img",
            "aria-label": description(structure),
        },
    )
    for line in lines:
        _draw_line(svg, line, [_attached(k, line, lines, boxes) for k in line.carriers], top)
    for k, label in direct.items():
        middle, y = (boxes[k].right + boxes[k + 1].left) / 2, top + BOX_HEIGHT / 2
        _path(svg, [(boxes[k].right, y), (boxes[k + 1].left, y)])
        _text(svg, label, middle, y - 6, "rank")
    for box, shape, whole in zip(boxes, structure.shapes, structure.factor_shapes, strict=True):
        frame = {"x": f"{box.left:g}", "y": str(top), "width": f"{box.width:g}", "height": str(BOX_HEIGHT), "rx": "4"}
        ET.SubElement(svg, "rect", frame)
        middle = box.left + box.width / 2
        _text(svg, _shape_text(shape), middle, top + 20, "shape")
        _text(svg, f"{prod(whole):,} entries", middle, top + 36, "entries")
    return ET.tostring(svg, encoding="unicode")


def description(structure: Structure) -> str:
    """The drawing in words."""
    if structure.is_dense:
        return f"One dense tensor of {_shape_text(structure.shapes[0])}"
    factors = ", ".join(f"{k} of {_shape_text(shape)}" for k, shape in enumerate(structure.shapes, start=1))
    shared = "; ".join(
        f"factors {', '.join(str(k + 1) for k in _carriers(structure, name))} share {name} of size {size}"
        for name, size in structure.ranks
    )
    return f"Factors {factors}" + (f"; {shared}" if shared else "")


def _shape_text(shape: Sequence[int]) -> str:
    return TIMES.join(map(str, shape))


def _carriers(structure: Structure, name: str) -> tuple[int, ...]:
    return tuple(k for k, carried in enumerate(structure.carries) if name in carried)


def _sorted_indices(structure: Structure) -> tuple[dict[int, str], list[tuple[str, tuple[int, ...]]]]:
    """Labels of the indices between factor k and the next one; labels and carriers of all others."""
    direct: dict[int, str] = {}
    others = []
    for name, size in structure.ranks:
        carriers, label = _carriers(structure, name), f"{name} = {size}"
        if len(carriers) == 2 and carriers[1] == carriers[0] + 1 and carriers[0] not in direct:
            direct[carriers[0]] = label
        else:
            others.append((label, carriers))
    return direct, others


def _lanes(others: Sequence[tuple[str, tuple[int, ...]]]) -> list[_Line]:
    """A lane for every line, short ones lowest, none beside another whose span it shares."""
    lines: list[_Line] = []
    for label, carriers in sorted(others, key=lambda other: (other[1][-1] - other[1][0], other[1])):
        taken = {line.lane for line in lines if _meet(line.carriers, carriers)}
        lane = next(lane for lane in range(len(lines) + 1) if lane not in taken)
        lines.append(_Line(label, carriers, lane))
    return lines


def _meet(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    return first[0] <= second[-1] and second[0] <= first[-1]


def _boxes(structure: Structure, labels: Sequence[str], lines: Sequence[_Line]) -> list[_Box]:
    boxes: list[_Box] = []
    left = 1.0
    for k, shape in enumerate(structure.shapes):
        attached = sum(k in line.carriers for line in lines)
        width = float(ceil(max(LETTER * len(_shape_text(shape)) + 16, LEAST_BOX, 26 * (attached + 1))))
        boxes.append(_Box(left, width))
        if k < len(labels):
            left += width + ceil(max(GAP, LETTER * len(labels[k]) + 20))
    return boxes


def _attached(k: int, line: _Line, lines: Sequence[_Line], boxes: Sequence[_Box]) -> float:
    """Where a line comes down to a box: lines from the left at the left, none across another's end."""

    def order(other: _Line) -> tuple[int, int]:
        if other.carriers[-1] == k:
            return 0, other.lane
        return (2, -other.lane) if other.carriers[0] == k else (1, other.lane)

    own = sorted((other for other in lines if k in other.carriers), key=order)
    return boxes[k].left + boxes[k].width * (own.index(line) + 1) / (len(own) + 1)


def _draw_line(svg: ET.Element, line: _Line, ends: Sequence[float], top: float) -> None:
    y = top - LANE * line.lane - LANE / 2 + 4
    _path(svg, [(ends[0], top), (ends[0], y), (ends[-1], y), (ends[-1], top)])
    for x in ends[1:-1]:
        _path(svg, [(x, y), (x, top)])
        ET.SubElement(svg, "circle", {"cx": f"{x:g}", "cy": f"{y:g}", "r": str(DOT)})
    _text(svg, line.label, (ends[0] + ends[1]) / 2, y - 5, "rank")


def _path(svg: ET.Element, points: Sequence[tuple[float, float]]) -> None:
    ET.SubElement(svg, "path", {"d": "M" + " L".join(f"{x:g} {y:g}" for x, y in points)})


def _text(svg: ET.Element, text: str, x: float, y: float, kind: str) -> None:
    element = ET.SubElement(svg, "text", {"x": f"{x:g}", "y": f"{y:g}", "class": kind, "text-anchor": "middle"})
    element.text = text
