"""Files that are either whole or not there: atomic writes, and reads that say what is wrong.

torch takes seconds to import: it is imported where tensors are read or written, so that what lists and compares runs,
which reads JSON and YAML alone, answers at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sekron_search.errors import ConfigError, RunFolderError

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        RunFolderError: If the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: damaged or unreadable ({error}); delete it to have it made again") from None


def read_yaml(path: Path, where: str) -> dict[Any, Any]:
    """Read a mapping from YAML.

    Args:
        path: The file.
        where: How errors name it.

    Raises:
        ConfigError: If the file is missing, not YAML, or no mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of keys, got {type(data).__name__}")
    return data


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically."""
    from safetensors.torch import save

    data = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors.

    Raises:
        RunFolderError: If the file is missing, truncated or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise RunFolderError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise RunFolderError(f"{path}: truncated or damaged ({error})") from None


def digest(values: Any) -> str:
    """Hash of nested tuples, lists and dictionaries of tensors and plain values."""
    import torch
    from torch import Tensor
    from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
    from torch.utils._pytree import tree_leaves

    found = hashlib.sha256()
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and not isinstance(leaf, UninitializedParameter | UninitializedBuffer):
            dense = leaf.detach().dequantize() if leaf.is_quantized else leaf.detach().to_dense()
            found.update(repr((str(leaf.dtype), tuple(leaf.shape))).encode())
            found.update(dense.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            # An object's own repr may hold its address, which no later process shares.
            plain = isinstance(leaf, str | int | float | bool | None | torch.dtype)
            found.update(repr(leaf if plain else type(leaf).__name__).encode())
    return found.hexdigest()


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a training checkpoint atomically; it is read with `weights_only=True`."""
    import torch

    with atomic(path) as temporary:
        torch.save(dict(state), temporary)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint.

    Raises:
        RunFolderError: If the file is missing or damaged.
    """
    import torch

    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise RunFolderError(f"{path}: damaged checkpoint ({error}); delete it to train again") from None
    return state
