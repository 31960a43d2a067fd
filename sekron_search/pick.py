"""A network of another run's search, which a run folder finishes instead of searching itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sekron_search.errors import RunFolderError
from sekron_search.files import read_json, write_json
from sekron_search.rundir import RunFolder
from sekron_search.search.budget import Budget

FORMAT = 1


@dataclass(frozen=True)
class Pick:
    """What a run folder finishes.

    Args:
        run: Identity of the run that has searched.
        source: What was picked there, for people: "trial 5", "selection params-0.4x".
        trial: Its index among the trials of the folder's own `search.json`.
        budget: What the finished network is judged by.
    """

    run: str
    source: str
    trial: int
    budget: Mapping[str, float | str]

    @property
    def bounds(self) -> Budget:
        """The budget as an object."""
        return Budget.of(self.budget)

    def save(self, folder: RunFolder) -> None:
        """Make a folder one that finishes this."""
        write_json(folder.pick, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def of(cls, folder: RunFolder) -> Pick | None:
        """What a folder finishes; None if its run searches itself.

        Raises:
            RunFolderError: If that is damaged or of another version.
        """
        if not folder.pick.exists():
            return None
        data = read_json(folder.pick)
        if data.get("format") != FORMAT:
            raise RunFolderError(f"{folder.pick}: expected format {FORMAT}; finish the network anew with this version")
        try:
            return cls(**{name: value for name, value in data.items() if name != "format"})
        except TypeError as error:
            raise RunFolderError(f"{folder.pick}: damaged ({error})") from None
