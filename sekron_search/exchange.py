"""Networks as files that other programs run: ONNX and pt2, written, opened again, and compared."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sekron_search.deployment import at_least_rounding, deploy, relative_difference
from sekron_search.errors import ConfigError, DataError
from sekron_search.files import atomic
from sekron_search.model import Inputs, as_inputs, batch_size, copy_model, output_tensors
from sekron_search.nested import map_tensors
from sekron_search.runtimes.exported import doubled, exported_program, quiet

FileFormat = Literal["onnx", "pt2"]

#: Largest difference of an exported network's output, relative to the output's largest entry.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExportedFile:
    """What was written, and how it compared.

    Args:
        path: The file.
        format: Of the file.
        num_bytes: Of the file.
        rel_difference: Largest difference of an output from the network's, relative to the output's largest entry.
        batch_sizes: With which it was compared.
    """

    path: Path
    format: str
    num_bytes: int
    rel_difference: float
    batch_sizes: tuple[int, ...]


def export_network(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    format: FileFormat,
    more_inputs: Sequence[Any] = (),
) -> ExportedFile:
    """Write a network, compressed or not, to a file for other programs; its batch size stays open.

    The file holds the network as `deploy` gives it. It is opened again and run, an ONNX file by ONNX Runtime, and its
    outputs compared with the network's; a file that differs is not left behind.

    Args:
        model: The network; it is not changed.
        example_inputs: What it takes: a tensor, or a tuple of positional arguments.
        path: File to write.
        format: "onnx", or "pt2" for `torch.export.load`.
        more_inputs: Further real inputs to compare on; their batch may be of another size than the example's. Without
            any, the example inputs twice over are used.

    Raises:
        ConfigError: If the format is unknown, or what it needs is not installed.
        DataError: If the network cannot be exported, or its outputs differ by more than 1e-4 of the largest, or in half
            precision more than its rounding makes up.
    """
    encode, decode = codec(format)
    inputs, network = on_cpu(as_inputs(example_inputs)), copy_model(model).cpu().eval()
    checks = [inputs, *(on_cpu(as_inputs(more)) for more in more_inputs)]
    if len(checks) == 1:
        checks.append(doubled(inputs))
    data = encode(deploy(network, inputs, tolerance=TOLERANCE), inputs)
    with torch.no_grad():
        outputs = [network(*check) for check in checks]
    with atomic(Path(path)) as temporary:
        temporary.write_bytes(data)
        opened = decode(temporary.read_bytes(), outputs[0])
        tolerance = at_least_rounding(TOLERANCE, [*network.parameters(), *output_tensors(outputs[0])])
        pairs = zip(checks, outputs, strict=True)
        difference = max(compare(opened, *pair, format, tolerance=tolerance) for pair in pairs)
    return ExportedFile(Path(path), format, len(data), difference, tuple(batch_size(check) for check in checks))


def codec(
    format: FileFormat,
) -> tuple[Callable[[nn.Module, Inputs], bytes], Callable[[bytes, Any], Callable[..., Any]]]:
    """How a format is written, from a deployed network and its inputs, and how it is read, given an output's structure.

    Raises:
        ConfigError: If the format is unknown, or what it needs is not installed.
    """
    if format == "pt2":
        return _to_pt2, _from_pt2
    if format != "onnx":
        raise ConfigError(f"export: expected format onnx or pt2, got {format!r}")
    try:
        from sekron_search.runtimes import onnx
    except ModuleNotFoundError as error:
        if str(error.name).startswith("sekron_search"):
            raise
        raise ConfigError(
            f"export to ONNX: the package {error.name!r} is not installed: pip install 'sekron-search[onnx]'"
        ) from None

    def encode(network: nn.Module, inputs: Inputs) -> bytes:
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data = tensor.data.contiguous()  # views that the exporter makes do not know of channels_last
        data = onnx.to_onnx(network, inputs, dynamic_batch=True)
        onnx.check_onnx(data)
        return data

    return encode, onnx.OnnxNetwork


def on_cpu(inputs: Inputs) -> Inputs:
    """The inputs in the memory of the CPU."""
    moved: Inputs = map_tensors(lambda tensor: tensor.cpu(), inputs)
    return moved


def compare(
    opened: Callable[..., Any], inputs: Inputs, output: Any, format: str, *, tolerance: float = TOLERANCE
) -> float:
    """How far the output of what a file holds is from the network's, relative to the largest entry.

    Raises:
        DataError: If it does not run, or is too far.
    """
    size = batch_size(inputs)
    try:
        with torch.no_grad():
            found = opened(*inputs)
    except Exception as error:  # whatever the runtime raises
        raise DataError(
            f"the exported {format} file does not run with a batch of {size}: {type(error).__name__}: {error}"
        ) from error
    difference = relative_difference(output_tensors(output), output_tensors(found))
    if not difference <= tolerance:
        raise DataError(
            f"the exported {format} file's outputs differ from the network's by {difference:.1e} of the largest with a "
            f"batch of {size}, more than {tolerance:.0e}; nothing was written"
        )
    return difference


def _to_pt2(network: nn.Module, inputs: Inputs) -> bytes:
    program, buffer = exported_program(network, inputs, dynamic_batch=True), io.BytesIO()
    with quiet():
        torch.export.save(program, buffer)
    return buffer.getvalue()


def _from_pt2(data: bytes, output: Any) -> Callable[..., Any]:
    with quiet():
        return torch.export.load(io.BytesIO(data)).module()
