"""What networks take and return: tensors, alone or nested in tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import SUPPORTED_NODES


def parts(value: Any) -> list[tuple[str, Any]] | None:
    """What a container holds, each with its key, position or field; None if the value is no container.

    Mappings of every class, tuples, named tuples, lists and dataclasses are containers, and classes that torch was
    told of by `torch.utils._pytree.register_pytree_node`.
    """
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]  # 1 and "1" are two keys
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, tuple | list):
        return [(str(index), item) for index, item in enumerate(value)]
    if (node := SUPPORTED_NODES.get(type(value))) is not None:
        return [(str(index), item) for index, item in enumerate(node.flatten_fn(value)[0])]
    return None


def named_leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, leaf) of everything that is no container, in order; names are joined by dots, "" of a lone leaf."""
    held = parts(value)
    if held is None:
        yield name, value
        return
    for key, item in held:
        yield from named_leaves(item, f"{name}.{key}" if name else key)


def leaves(value: Any) -> list[Any]:
    """Everything in a value that is no container."""
    return [leaf for _, leaf in named_leaves(value)]


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a value."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """A value of the same containers, its leaves replaced by what the function makes of them."""
    held = parts(value)
    if held is None:
        return function(value)
    return _with_parts(value, [map_leaves(function, item) for _, item in held])


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A value of the same containers, its tensors replaced by what the function makes of them."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)


def is_plain(value: Any) -> bool:
    """Whether a value is of tensors, dictionaries, lists and tuples alone."""
    held = parts(value)
    if held is None:
        return isinstance(value, Tensor)
    return type(value) in (dict, list, tuple) and all(is_plain(item) for _, item in held)


def as_plain(value: Any) -> Any:
    """The tensors of a value in dictionaries, lists and tuples alone: what a file can hold, and a tracer follow.

    What holds no tensor (a number, a string) is left out.
    """
    held = parts(value)
    if held is None:
        return value
    kept = [(key, as_plain(item)) for key, item in held if tensors(item)]
    if isinstance(value, Mapping) or is_dataclass(value):
        return dict(kept)
    items = [item for _, item in kept]
    return items if isinstance(value, list) else tuple(items)


def hidden_tensors(value: Any) -> str | None:
    """The class of an object in a value that is no container, though it has tensors as attributes; None without one."""
    for leaf in leaves(value):
        attributes = getattr(leaf, "__dict__", None)
        if isinstance(leaf, Tensor) or not isinstance(attributes, dict):
            continue
        if any(tensors(held) for held in attributes.values()):
            return type(leaf).__name__
    return None


def _with_parts(value: Any, items: list[Any]) -> Any:
    if isinstance(value, MutableMapping):
        # Whatever else a class of the user's keeps comes along; a shallow copy may share with it where the items lie.
        own = copy.deepcopy(value, {id(leaf): leaf for leaf in leaves(value)})
        for key, item in zip(value, items, strict=True):
            own[key] = item
        return own
    if isinstance(value, Mapping):
        return dict(zip(value, items, strict=True))
    if is_dataclass(value):
        changed = copy.copy(value)
        for field, item in zip(fields(value), items, strict=True):
            object.__setattr__(changed, field.name, item)  # frozen ones too
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*items)
    if isinstance(value, tuple | list):
        return type(value)(items)
    node = SUPPORTED_NODES[type(value)]
    return node.unflatten_fn(items, node.flatten_fn(value)[1])
