"""Damage: documents with parts exchanged, removed or renamed, and files with bytes exchanged, removed or put in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import strategies as st

from sekron_search.errors import SekronError

T = TypeVar("T")

#: What may stand where something else is expected.
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3)
    | st.sampled_from([2**31, 2**63, 10**30, -1, 0])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["0.5x", "1e999", "../..", "a\0b", "~nobody/x", "x" * 300, "\ud800", "[", "*"])
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def documents(draw: st.DrawFn, document: Any) -> Any:
    """A document of dictionaries, lists and scalars with one to three damages."""
    found = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(found))
        if not places:
            break
        parent, key = draw(st.sampled_from(places))
        _damage(draw, parent, key)
    return found


def _damage(draw: st.DrawFn, parent: Any, key: Any) -> None:
    kind = draw(st.sampled_from(["replace", "remove", "rename", "swap", "scale", "nest"]))
    value = parent[key]
    if kind == "remove":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw(st.text(max_size=8))] = parent.pop(key)
    elif kind == "swap":
        other = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
        parent[key], parent[other] = parent[other], value
    elif kind == "scale" and isinstance(value, int | float):
        parent[key] = value * draw(st.sampled_from([-1, 0, 2, 1000]))
    elif kind == "nest":
        parent[key] = draw(st.sampled_from([[value], {"a": value}]))
    else:
        parent[key] = draw(JUNK)


def _places(document: Any) -> Any:
    """All pairs of a container and a key of it."""
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        yield document, key
        yield from _places(document[key])


@st.composite
def contents(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with one to three damages: a stretch removed, exchanged, repeated, or one put in; or cut off."""
    found = content
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(found)))
        length = draw(st.integers(0, 8) | st.integers(0, len(found)))
        kind = draw(st.sampled_from(["exchange", "remove", "repeat", "cut"]))
        if kind == "cut":
            found = found[:start]
        elif kind == "remove":
            found = found[:start] + found[start + length :]
        elif kind == "repeat":
            found = found[:start] + 2 * found[start : start + length] + found[start + length :]
        else:
            put = draw(st.binary(max_size=8))
            found = found[:start] + put + found[start + len(put) :]
    return found


@dataclass(frozen=True)
class Refusal:
    """An error of ours, in words."""

    message: str


def outcome(call: Callable[[], T], kind: type[SekronError] = SekronError) -> T | Refusal:
    """What a call gives, or what its error says, which is of a kind of ours."""
    try:
        return call()
    except kind as error:
        return Refusal(str(error))
