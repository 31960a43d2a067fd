"""Files of tensors, and hashes of them. Apart from `files`, which opens without torch."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from sekron_search.errors import RunFolderError
from sekron_search.files import CHECKSUM, atomic
from sekron_search.nested import leaves


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
            # Its memory itself: weights may take gigabytes.
            found.update(dense.cpu().resolve_conj().contiguous().flatten().view(torch.uint8).numpy().data)
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
    """Read a training checkpoint, its tensors to the CPU, wherever it was written.

    Raises:
        RunFolderError: If the file is missing or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise RunFolderError(f"{path}: damaged checkpoint ({error}); delete it to train again") from None
    return state
