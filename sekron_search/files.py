"""Files that are either whole or not there: atomic writes, and reads that say what is wrong."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from sekron_search.errors import ConfigError, RunFolderError
from sekron_search.nested import leaves

#: Key of a JSON file's checksum.
CHECKSUM = "checksum"


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well, and vanishes when it does not.

    Raises:
        RunFolderError: If the disk is full, or the folder cannot be written.
    """
    try:
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
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a mapping as JSON, atomically, with a checksum of it as its last key."""
    write_text(path, _json_text({**data, CHECKSUM: _checksum(data)}))


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` has written.

    Raises:
        RunFolderError: If the file is missing, damaged, or was changed since it was written.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path}: damaged or unreadable ({error}); delete it to have it made again") from None
    if not isinstance(data, dict) or CHECKSUM not in data:
        raise RunFolderError(
            f"{path}: it has no checksum; an earlier version wrote it, or something else: delete it to have it made "
            "again"
        )
    checksum = data.pop(CHECKSUM)
    if checksum != _checksum(data):
        raise RunFolderError(f"{path}: it was changed since it was written; delete it to have it made again")
    return data


def _json_text(data: Any) -> str:
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _checksum(data: Mapping[str, Any]) -> str:
    # Numbers that were read from JSON are written as they were, and keys keep their order.
    return hashlib.sha256(_json_text(dict(data)).encode()).hexdigest()


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
    except UnicodeEncodeError as error:  # of the path
        raise ConfigError(f"{where!a}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise ConfigError(f"{where}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of keys, got {type(data).__name__}")
    return data


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically, with a checksum of them in the metadata."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = save(plain, {CHECKSUM: digest(sorted(plain.items()))})
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors; a checksum that `write_tensors` left is compared.

    Raises:
        RunFolderError: If the file is missing, truncated, damaged or was changed.
    """
    try:
        with safe_open(path, "pt") as file:
            checksum = (file.metadata() or {}).get(CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise RunFolderError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise RunFolderError(f"{path}: truncated or damaged ({error})") from None
    if checksum is not None and checksum != digest(sorted(tensors.items())):
        raise RunFolderError(f"{path}: its tensors are not those that were written: it is damaged, or was changed")
    return tensors


def digest(values: Any) -> str:
    """Hash of nested containers (see `nested.parts`) of tensors and plain values."""
    found = hashlib.sha256()
    for leaf in leaves(values):
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
    content = io.BytesIO()  # torch's own writing to a full disk gives errors of many kinds
    torch.save(dict(state), content)
    with atomic(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint.

    Raises:
        RunFolderError: If the file is missing or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise RunFolderError(f"{path}: damaged checkpoint ({error}); delete it to train again") from None
    return state
