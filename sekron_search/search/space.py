"""Search spaces: which structures are options for a layer. YAML on disk."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sekron_search.errors import ConfigError
from sekron_search.files import read_yaml
from sekron_search.kron.enumeration import FAMILIES
from sekron_search.references import name_or_reference

#: A family by name, or a function of (weight shape, most factors) that gives its skeletons.
Family = Annotated[str, name_or_reference(*FAMILIES)]

#: How pydantic names, in the path of a key, which of several kinds that a value may be of it was compared with.
_ALTERNATIVE = re.compile(r"literal\[.*\]|constrained-\w+")


class SearchSpace(BaseModel):
    """Which structures are options for a layer.

    Args:
        name: For reports.
        families: Families to enumerate, by name or as `package.module:function` of the user's own; leaving a layer as
            it is is always an option.
        max_factors: Longest sequence for the families with free factor shapes.
        rank_levels: Ranks per skeleton, spread on a logarithmic scale.
        rank_multiple: Ranks that are larger are multiples of this; under a latency budget, of the multiple of channels
            at which the device's time steps, if that is larger.
        channel_multiple: The families with free factor shapes also see the channels padded with zeros to multiples of
            this, where that adds a quarter at most: prime numbers of channels have no divisors. 1: never.
        max_fits: At most so many structures of three factors and more are fitted per layer only to be scored, spread
            over the enumeration, less those that would take minutes; two factors are scored all, by their spectra.
        max_options: At most so many options per layer are refined on calibration data.
        dense_execution: Also offer every structure with its weight rebuilt at load: fewer parameters, dense speed.
        include: Names of the layers that may be replaced, or of modules that hold them, with `*` wildcards.
        exclude: Names of those that stay as they are all the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "default"
    families: Annotated[tuple[Family, ...], Field(min_length=1)] = ("sekron", "tucker2", "depthwise_cp")
    max_factors: Annotated[int, Field(ge=2, le=5)] = 2
    rank_levels: Annotated[int, Field(ge=1, le=64)] = 12
    rank_multiple: Annotated[int, Field(ge=1)] = 1
    channel_multiple: Annotated[int, Field(ge=1)] = 8
    max_fits: Annotated[int, Field(ge=0)] = 64
    max_options: Annotated[int, Field(ge=1)] = 64
    dense_execution: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def with_granularity(self, multiple: int) -> SearchSpace:
        """The space for a device whose time steps at multiples of so many channels."""
        return self.model_copy(update={"rank_multiple": max(self.rank_multiple, multiple)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SearchSpace:
        """Read a search space from YAML.

        Raises:
            ConfigError: If the file is missing or damaged, or a key is unknown or of the wrong type; names both.
        """
        path = Path(path)
        data = read_yaml(path, f"search space {path}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(error, f"search space {path}", cls)) from None


def explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """One line per key that pydantic found wrong: its path, what was expected, what came."""
    unknown: list[str] = []
    expected: dict[str, list[str]] = {}
    came: dict[str, str] = {}
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"] if not _ALTERNATIVE.fullmatch(str(part)))
        if problem["type"] == "extra_forbidden":
            known = ", ".join(_keys_at(model, problem["loc"][:-1]))
            unknown.append(f"key '{path}' is not known; expected one of: {known}")
            continue
        told = problem["msg"].removeprefix("Value error, ").removeprefix(f"{path}: ")
        expected.setdefault(path, []).append(f"{told[0].lower()}{told[1:]}")
        came[path] = "nothing" if problem["type"] == "missing" else f"{problem['input']!r:.80}"
    # What is wrong between keys names them itself.
    wrong = [
        f"key '{path}': {' or '.join(told)}; got {came[path]}" if path else "; ".join(told)
        for path, told in expected.items()
    ]
    return f"{where}: " + "; ".join(unknown + wrong)


def _keys_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Keys of the nested model at a path, as far as it can be followed."""
    for part in path:
        field = model.model_fields.get(str(part))
        nested = field.annotation if field is not None else None
        candidates = [nested, *getattr(nested, "__args__", ())]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not found:
            return []
        model = found[0]
    return sorted(model.model_fields)
