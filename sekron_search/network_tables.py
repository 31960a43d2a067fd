"""What a network's layers can become: the tables of all of them, their factors, and the original's facts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sekron_search.costs.memory import PeakMemory
from sekron_search.inspection import Inspection
from sekron_search.model import LayerInfo
from sekron_search.search.options import Network
from sekron_search.tables import FittedLayer
from sekron_search.timing import Layout


@dataclass(frozen=True)
class Tables:
    """The original's facts, and what every layer can become.

    `files` is where the options' factors are kept, `whole` the tables before what the budget never picks was left out.
    """

    inspection: Inspection
    layers: tuple[LayerInfo, ...]
    original: dict[str, float]
    memory: PeakMemory
    layout: Layout
    fitted: tuple[FittedLayer, ...]
    files: tuple[Path, ...] = ()
    whole: Network | None = None

    @cached_property
    def network(self) -> Network:
        """The tables as the search sees them."""
        tables = (dataclasses.replace(f.table, outside_bytes=self.memory.outside[f.table.name]) for f in self.fitted)
        formats = self.layout.original_ms
        drift = formats[self.layout.memory_format] / formats[self.layout.original_format]
        return Network(tuple(tables), self.original, float(self.memory.floor), latency_drift=drift)
