"""The runtimes by name; each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

import torch

from sekron_search.errors import ConfigError
from sekron_search.precision import is_there
from sekron_search.references import import_reference
from sekron_search.runtimes.base import MemoryFormat, Runtime, RuntimeName

RUNTIMES: dict[RuntimeName, str] = {
    "pytorch-eager": "eager:EagerRuntime",
    "torch-compile": "compiled:CompileRuntime",
    "onnxruntime": "onnx:OnnxRuntime",
    "openvino": "openvino:OpenVinoRuntime",
}

#: Extra of this package that installs what a runtime needs.
EXTRAS: dict[RuntimeName, str] = {"onnxruntime": "onnx", "openvino": "openvino"}


def make_runtime(
    name: str,
    *,
    num_threads: int | None = None,
    device: str | torch.device = "cpu",
    memory_format: MemoryFormat = "contiguous",
) -> Runtime:
    """A runtime by its name.

    Args:
        name: A key of `RUNTIMES`, or `package.module:Class` of a subclass of `Runtime`.
        num_threads, device, memory_format: As of `Runtime`.

    Raises:
        ConfigError: If there is no such runtime, what it needs is not installed, or it does not run on that device or
            in that memory format.
    """
    if name not in RUNTIMES and ":" not in name:
        raise ConfigError(
            f"runtime: expected one of {', '.join(RUNTIMES)}, or package.module:Class of your own, got {name!r}"
        )
    if num_threads is not None and num_threads < 1:
        raise ConfigError(f"runtime {name}: expected at least one thread, got {num_threads}")
    kind, device = runtime_class(name), checked_device(device)
    if device.type not in kind.device_types:
        raise ConfigError(
            f"runtime {name}: it runs on {' or '.join(kind.device_types)}, got device '{device}'; "
            "choose another device, or pytorch-eager or torch-compile"
        )
    if not is_there(device):
        raise ConfigError(f"device: torch sees no CUDA device here, got {str(device)!r}; use 'cpu'")
    if memory_format not in kind.memory_formats:
        raise ConfigError(
            f"runtime {name}: expected memory format {' or '.join(kind.memory_formats)}, got {memory_format!r}"
            + ("; it lays out memory itself" if kind.memory_formats == ("contiguous",) else "")
        )
    return kind(num_threads, device, memory_format)


def checked_device(device: str | torch.device) -> torch.device:
    """A device of a name that torch knows.

    Raises:
        ConfigError: If there is none of that name.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"device: expected one of torch's such as 'cpu', 'cuda' or 'cuda:1', got {device!r}"
        ) from None
    return found


def runtime_class(name: str) -> type[Runtime]:
    """The class of a runtime; errors as of `make_runtime` where what it needs is not installed."""
    if name not in RUNTIMES:
        own = import_reference(name, "latency.runtime")
        if not (isinstance(own, type) and issubclass(own, Runtime)):
            raise ConfigError(f"key 'latency.runtime': expected a subclass of Runtime, got {name!r}")
        return own
    module, _, attribute = RUNTIMES[name].partition(":")
    try:
        found: type[Runtime] = getattr(import_module(f"sekron_search.runtimes.{module}"), attribute)
    except ModuleNotFoundError as error:
        if name not in EXTRAS or str(error.name).startswith("sekron_search"):
            raise
        raise ConfigError(
            f"runtime {name}: the package {error.name!r} is not installed: pip install 'sekron-search[{EXTRAS[name]}]'"
        ) from None
    return found
