"""Names of functions and classes of the user's, `package.module:name`, in configurations."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from sekron_search.errors import ConfigError

REFERENCE = r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*"
Reference = Annotated[str, Field(pattern=f"^{REFERENCE}$")]


def name_or_reference(*names: str, what: str = "function") -> AfterValidator:
    """Of a string in a configuration: that it is one of the names, or a reference to something of the user's."""

    def check(value: str) -> str:
        if value not in names and re.fullmatch(REFERENCE, value) is None:
            raise ValueError(f"expected {', '.join(names)} or a {what} of your own as 'package.module:{what}'")
        return value

    return AfterValidator(check)


def import_reference(reference: str, key: str) -> Callable[..., Any]:
    """The function or class that `package.module:name` names; the working directory can be imported from.

    Args:
        reference: The name.
        key: Of the configuration, for messages.

    Raises:
        ConfigError: If it cannot be imported, or is not the user's own code or an installed package's: what the
            standard library offers is never called on behalf of a file.
    """
    module_name, _, path = reference.partition(":")
    package = module_name.partition(".")[0]
    if not path or package in sys.stdlib_module_names:
        raise ConfigError(f"key '{key}': expected 'package.module:function' of your own, got {reference!r}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        target: Any = importlib.import_module(module_name)
        for part in path.split("."):
            target = getattr(target, part)
    except Exception as error:  # whatever the module does when it is imported
        raise ConfigError(f"key '{key}': cannot import {reference!r}: {_explained(error, package)}") from error
    home = str(getattr(target, "__module__", None)).partition(".")[0]
    if home != package or home in {"torch", "numpy"}:
        raise ConfigError(
            f"key '{key}': {reference!r} is defined in {home!r}; expected 'package.module:function' of your own"
        )
    if not callable(target):
        raise ConfigError(f"key '{key}': {reference!r} is not callable")
    result: Callable[..., Any] = target
    return result


def _explained(error: Exception, package: str) -> str:
    """What went wrong, and what to do where a package is missing."""
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    told = f"{type(error).__name__}: {error}"
    if missing is None:
        return told
    if missing != package:
        return f"{told}; it is imported there: pip install {missing.partition('.')[0]}, or whatever package has it"
    return (
        f"{told}; install the package that has it (pip install {package}), or, if the code is your own, start from the "
        "folder that it lies in"
    )
