"""The tables of a search as a file: what another budget is answered from, without network or data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sekron_search.errors import RunFolderError
from sekron_search.files import read_json, write_json
from sekron_search.search.budget import CostName
from sekron_search.search.options import Assignment, LayerTable, Network, Option
from sekron_search.search.trial import Trial

FORMAT = 4

#: What brings back a file of a search that was damaged: everything else that the run made is still there.
SEARCH_AGAIN = "delete it, and report.json if there is one, and go on with the run by --resume"


@dataclass(frozen=True)
class SearchRecord:
    """All options of a network's layers, and which of them a search saw.

    Args:
        network: With every option that was fitted.
        searched: For every layer, which options the search saw: those that none beats on the budgeted costs.
        budgeted: These costs.
    """

    network: Network
    searched: tuple[tuple[int, ...], ...]
    budgeted: tuple[CostName, ...]

    @classmethod
    def of(cls, network: Network, searched: Network, budgeted: Sequence[CostName]) -> SearchRecord:
        """The record of a search in part of a network's options."""
        kept = tuple(
            tuple(whole.options.index(option) for option in part.options)
            for whole, part in zip(network.tables, searched.tables, strict=True)
        )
        return cls(network, kept, tuple(budgeted))

    def whole(self, assignment: Assignment) -> Assignment:
        """An assignment of the search as one of all options."""
        return tuple(kept[i] for kept, i in zip(self.searched, assignment, strict=True))

    def check_options(self, options: Sequence[Sequence[Option]], where: Path) -> None:
        """Raise a `RunFolderError` unless the options of the layers, all that were fitted, are those of the record.

        Args:
            options: Of every layer, as they are now.
            where: The record's file, for the message.
        """

        def told(own: Sequence[Option]) -> list[Any]:
            return [(o.structure, o.schedule, o.execution, o.error) for o in own]

        if [told(own) for own in options] != [told(table.options) for table in self.network.tables]:
            raise RunFolderError(
                f"{where}: the options of its layers are no longer those of its search; was it written by another "
                "version?"
            )

    def save(self, path: Path) -> None:
        """Write the record."""
        data = {"format": FORMAT, "network": network_json(self.network), "budgeted": list(self.budgeted)}
        write_json(path, {**data, "searched": [list(kept) for kept in self.searched]})

    @classmethod
    def load(cls, path: Path) -> SearchRecord:
        """Read a record.

        Raises:
            RunFolderError: If it is missing, damaged or of another version.
        """
        data = read_json(path, remedy=SEARCH_AGAIN)
        if data.get("format") != FORMAT:
            found = data.get("format")
            raise RunFolderError(f"{path}: expected format {FORMAT}, got {found!r}; run it anew with this version")
        try:
            searched = tuple(tuple(int(i) for i in kept) for kept in data["searched"])
            return cls(network_from_json(data["network"]), searched, tuple(data["budgeted"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunFolderError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def read_trials(path: Path) -> list[Trial]:
    """The trials of a search.

    Raises:
        RunFolderError: If the file is missing or damaged.
    """
    data = read_json(path, remedy=SEARCH_AGAIN)
    try:
        return [Trial.from_json(trial) for trial in data["trials"]]
    except (KeyError, TypeError) as error:
        raise RunFolderError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def trial_of(trials: Sequence[Trial], index: int, where: Path) -> Trial:
    """The trial of a number.

    Raises:
        RunFolderError: If there is none; says which there are.
    """
    found = next((trial for trial in trials if trial.index == index), None)
    if found is None:
        known = f"{trials[0].index} to {trials[-1].index}" if trials else "none"
        raise RunFolderError(f"{where}: expected the number of one of its trials ({known}), got {index}")
    return found


def network_json(network: Network) -> dict[str, Any]:
    """Tables and costs as plain data."""
    return {**asdict(network), "original": dict(network.original)}


def network_from_json(data: Mapping[str, Any]) -> Network:
    """Inverse of `network_json`."""
    return Network(**{**data, "tables": tuple(_table(table) for table in data["tables"])})


def _table(data: Mapping[str, Any]) -> LayerTable:
    options = tuple(Option.from_json(o) for o in data["options"])
    responses = tuple((float(error), float(response)) for error, response in data["responses"])
    return LayerTable(**{**data, "options": options, "responses": responses})
