"""What the processes of a team need to know of a training that the first of them begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from sekron_search.sections import FinetuneConfig


@dataclass(frozen=True)
class Task:
    """A training.

    Args:
        config: Of it.
        limit: Batches of an epoch at most.
        frees_layers: Whether errors of layers count less and less.
        layers: How the replaced layers are built.
        state: Of the network.
        checkpoint: To go on from.
    """

    config: FinetuneConfig
    limit: int | None
    frees_layers: bool
    layers: Mapping[str, Mapping[str, str]]
    state: Mapping[str, Tensor]
    checkpoint: dict[str, Any] | None

    def to_plain(self) -> dict[str, Any]:
        """As plain data and tensors."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**own, "config": self.config.model_dump(mode="json")}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Task:
        """What `to_plain` gave."""
        return cls(**{**data, "config": FinetuneConfig.model_validate(data["config"])})
