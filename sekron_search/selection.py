"""Which layers are worth replacing: those that the search space includes and has cheaper structures for."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from sekron_search.errors import ConfigError
from sekron_search.inspection import Inspection, SkippedLayer
from sekron_search.kron.dense import KINDS
from sekron_search.model import LayerInfo
from sekron_search.scoring import candidates
from sekron_search.search.space import SearchSpace


def worthwhile(inspection: Inspection, space: SearchSpace) -> Inspection:
    """What is left to be searched; the other layers that could be replaced join the skipped ones, with the reason.

    Raises:
        ConfigError: If a pattern of the space fits no layer of the network.
    """
    included = {info.name for info in selected(inspection, space)}
    layers, skipped = [], list(inspection.skipped)
    for info in inspection.layers:
        if info.name not in included:
            reason = "the search space leaves it out (space.include, space.exclude)"
        elif not candidates(info, space):
            reason = f"no structure of the search space {space.name!r} is cheaper than the dense layer"
        else:
            layers.append(info)
            continue
        skipped.append(SkippedLayer(info.name, KINDS[info.kind].__name__, reason))
    return Inspection(tuple(layers), tuple(skipped))


def selected(inspection: Inspection, space: SearchSpace) -> list[LayerInfo]:
    """The layers that can be replaced, that the space includes and does not exclude.

    Raises:
        ConfigError: If a pattern of the space fits no layer of the network.
    """

    def matches(name: str, patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"{p}.*") for p in patterns)

    names = [info.name for info in inspection.layers] + [skipped.name for skipped in inspection.skipped]
    for key, patterns in (("include", space.include), ("exclude", space.exclude)):
        for pattern in patterns:
            if pattern != "*" and not any(matches(name, [pattern]) for name in names):
                raise ConfigError(
                    f"key 'space.{key}': {pattern!r} fits no layer; the network's layers are {', '.join(names)}"
                )
    return [i for i in inspection.layers if matches(i.name, space.include) and not matches(i.name, space.exclude)]
