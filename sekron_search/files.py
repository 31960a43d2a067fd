"""Files that are either whole or not there: atomic writes, and reads that say what is wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sekron_search.errors import ConfigError, RunFolderError

#: Key of a file's checksum.
CHECKSUM = "checksum"

#: How a JSON file ends: the checksum is of the text without it. A comma stands before unless there is nothing else.
_SEAL = re.compile(rf'(,?)\n "{CHECKSUM}": "([0-9a-f]{{64}})"\n}}\n\Z')


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
    """Write a mapping as JSON, atomically, with a checksum of the text as its last key."""
    text = json.dumps(data, indent=1, allow_nan=False)
    head, comma = (text.removesuffix("\n}"), ",") if data else ("{", "")
    write_text(path, f'{head}{comma}\n "{CHECKSUM}": "{_checksum(text)}"\n}}\n')


def read_json(path: Path, *, remedy: str = "delete it to have it made again") -> dict[str, Any]:
    """Read what `write_json` has written.

    Args:
        path: The file.
        remedy: What to do if it cannot be read, for the message.

    Raises:
        RunFolderError: If the file is missing, damaged, or was changed since it was written.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, parse_constant=_no_number)
    except FileNotFoundError:
        raise RunFolderError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path}: damaged or unreadable ({error}); {remedy}") from None
    if not isinstance(data, dict) or CHECKSUM not in data:
        raise RunFolderError(f"{path}: it has no checksum; an earlier version wrote it, or something else: {remedy}")
    del data[CHECKSUM]
    seal = _SEAL.search(text)
    # The text as it stands is compared: to write it again would take several times as long as to read it.
    if seal is None or seal[2] != _checksum(text[: seal.start()] + ("\n}" if seal[1] else "}")):
        raise RunFolderError(f"{path}: it was changed since it was written; {remedy}")
    return data


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _checksum(text: str) -> str:
    return hashlib.sha256(f"{text}\n".encode()).hexdigest()


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
