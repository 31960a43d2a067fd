"""Networks as programs of `torch.export`: what pt2 files hold and ONNX models are made of."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from sekron_search.errors import DataError
from sekron_search.model import Inputs, batch_size, with_plain_outputs
from sekron_search.nested import map_tensors, tensors


def exported_program(module: nn.Module, inputs: Inputs, *, dynamic_batch: bool) -> ExportedProgram:
    """A network as one graph of operators; outputs in classes of the user's become dictionaries and tuples.

    Args:
        module: In evaluation mode; it is not changed.
        inputs: Its positional arguments.
        dynamic_batch: Whether the batch may have another size when the program is run: the first axis of every input
            whose first axis is as long as the batch.

    Raises:
        DataError: If torch cannot export it, or its batch size cannot be left open.
    """
    shapes = ShapesCollection()
    if dynamic_batch:
        if batch_size(inputs) == 1:
            inputs = doubled(inputs)  # torch takes an axis of size 1 for one that is never longer
        size, batch = batch_size(inputs), Dim("batch")
        for leaf in tensors(inputs):
            if leaf.dim() > 0 and leaf.shape[0] == size:
                shapes[leaf] = {0: batch}
    with quiet(), torch.no_grad():
        try:
            spec: Any = shapes if dynamic_batch else None
            return torch.export.export(with_plain_outputs(module, inputs), inputs, dynamic_shapes=spec)
        except Exception as error:  # torch raises many kinds
            raise DataError(_explained(module, error)) from error


def doubled(inputs: Inputs) -> Inputs:
    """The same samples twice."""
    size = batch_size(inputs)

    def twice(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor]) if tensor.dim() > 0 and tensor.shape[0] == size else tensor

    result: Inputs = map_tensors(twice, inputs)
    return result


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters say of themselves: deprecations, advice to their developers, graphs that failed."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), Path(os.devnull).open("w") as sink:
            warnings.simplefilter("ignore")
            with redirect_stdout(sink), redirect_stderr(sink):
                yield
    finally:
        logger.setLevel(level)


def _explained(module: nn.Module, error: Exception) -> str:
    kind = type(module).__name__
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "batch" in str(error) and "onstraints violated" in str(error):
        return (
            f"{kind} cannot be exported for other batch sizes than the example's: its forward fixes the size of the "
            "first axis; write -1 or x.shape[0] for it"
        )
    return (
        f"{kind} cannot be exported: {reason} An exported network does the same operations whatever the input holds: "
        "replace branches on tensor values, `.item()` and loops over data by tensor operations"
    )
