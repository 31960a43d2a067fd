"""Which studies a storage holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sekron_search.search.ledger import CLOSED, FACTS, OVER
from sekron_search.search.storage import Store

#: The fact that says to which run a study belongs.
RUN = "run"


@dataclass(frozen=True)
class Search:
    """A study of a storage.

    Args:
        name: Of the study.
        facts: What it is.
        closed: Whether it is over.
        over: Whether it was the last one of its run.
    """

    name: str
    facts: Mapping[str, Any]
    closed: bool
    over: bool


def searches(store: Store, run: str | None = None) -> list[Search]:
    """The studies of a storage, or of one run in it, that have said what they are, in the order of their making."""
    found = sorted(store.patiently(store.backend.get_all_studies), key=lambda study: study._study_id)
    return [
        Search(
            study.study_name,
            study.user_attrs[FACTS],
            bool(study.user_attrs.get(CLOSED)),
            bool(study.user_attrs.get(OVER)),
        )
        for study in found
        if FACTS in study.user_attrs and run in (None, study.user_attrs[FACTS].get(RUN))
    ]
