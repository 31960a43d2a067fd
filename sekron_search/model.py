"""Layers that can be replaced, and networks with some of them replaced."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from sekron_search.errors import DataError, StructureError, UnsupportedLayerError, is_out_of_memory
from sekron_search.kron.conv import KroneckerConv, KroneckerConvTranspose
from sekron_search.kron.dense import LayerKind, class_names, dense_weight
from sekron_search.kron.geometry import ConvGeometry, Size
from sekron_search.kron.layer import HowToRun, KroneckerLayer
from sekron_search.kron.linear import KroneckerLinear
from sekron_search.kron.structure import Shape, Structure
from sekron_search.nested import as_plain, is_plain, leaves, map_leaves, map_tensors, tensors

Inputs = tuple[Any, ...]
OutputShift = Literal["absorbed", "correctable", "kept"]

#: What can stand in the place of a dense layer of a class.
REPLACEMENTS: dict[type[nn.Module], type[KroneckerLayer]] = {
    dense: layer for layer in (KroneckerLinear, KroneckerConv, KroneckerConvTranspose) for dense in layer.replaces
}


@dataclass(frozen=True)
class LayerInfo:
    """A layer that can be replaced.

    Args:
        name: Its name in the network.
        kind: "linear", "conv2d", "conv_transpose2d", ...
        weight_shape: (F, C, *kernel) of one group, F its out-channels.
        geometry: Stride, dilation, zero padding, groups.
        input_size: Spatial size on entry, non-zero padding modes included, (1, 1) for a linear layer; of a transposed
            convolution the size on exit, which is what the convolution takes whose adjoint it is.
        positions_per_sample: How often the layer is applied to one sample: tokens of a linear layer; crops or frames
            of a convolution, where the network folds them into its batch. No whole number where they do not follow the
            batch, a table of the network's own say, whose share of a sample it is then.
        output_shift: What becomes of a constant shift of the output: "absorbed" by a batch-norm that follows,
            "correctable" through the layer's own bias, or "kept".
        dtype: Of the weight, by its name in torch: latencies are of it. No part of what a layer can become, which fits
            in double precision decide.
    """

    name: str
    kind: LayerKind
    weight_shape: Shape
    geometry: ConvGeometry
    input_size: Size
    positions_per_sample: float
    output_shift: OutputShift
    dtype: str = field(default="float32", repr=False)

    @property
    def out_channels(self) -> int:
        """Of the whole layer."""
        return self.weight_shape[0] * self.geometry.groups

    @property
    def in_channels(self) -> int:
        """Of the whole layer."""
        return self.weight_shape[1] * self.geometry.groups


def as_inputs(example_inputs: Any) -> Inputs:
    """The positional arguments of the network: a tuple as it is, anything else as the only argument."""
    return tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)


def device_of(model: nn.Module) -> torch.device:
    """Where a network is: its first parameter, or buffer; the CPU if it has neither."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def batch_size(inputs: Inputs) -> int:
    """Number of samples: the leading size of the first tensor."""
    for tensor in tensors(inputs):
        if tensor.dim() > 0 and tensor.shape[0] > 0:
            return int(tensor.shape[0])
    raise DataError(
        f"expected an example input with a tensor whose first axis is the batch, got {shapes(inputs) or 'nothing'}"
    )


def part_of(inputs: Inputs, samples: slice) -> Inputs:
    """Some samples of a batch; tensors whose first axis is not as long as the batch stay."""
    part: Inputs = cut(inputs, samples, batch_size(inputs))
    return part


def cut(value: Any, samples: slice, size: int) -> Any:
    """Some of `size` samples: of every tensor whose first axis is so long; the others stay."""
    return map_tensors(lambda t: t[samples] if t.dim() > 0 and t.shape[0] == size else t, value)


def joined(batches: Sequence[Inputs]) -> Inputs:
    """All samples in one batch; what has no batch axis is the first one's.

    Raises:
        DataError: If the batches' tensors differ in more than the number of samples.
    """
    sizes = [batch_size(inputs) for inputs in batches]

    def join(column: tuple[Any, ...]) -> Any:
        per_sample = all(
            isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == n for t, n in zip(column, sizes, strict=True)
        )
        return torch.cat(column) if per_sample else column[0]

    try:
        columns = iter(list(zip(*map(leaves, batches), strict=True)))
        result: Inputs = map_leaves(lambda leaf: join(next(columns)), batches[0])
    except (RuntimeError, ValueError):
        came = " and ".join(map(shapes, batches))
        raise DataError(f"expected batches that differ in nothing but the number of samples, got {came}") from None
    return result


def shapes(value: Any) -> str:
    """The shapes of what a network takes or gives, classes of what is no tensor, for messages."""
    return ", ".join(str(tuple(i.shape)) if isinstance(i, Tensor) else type(i).__name__ for i in leaves(value))


def first_batches(batches: Sequence[Inputs], samples: int) -> Sequence[Inputs]:
    """The first batches, as many as it takes for so many samples; all if there are fewer."""
    seen = list(accumulate(batch_size(inputs) for inputs in batches))
    return batches[: 1 + sum(count < samples for count in seen)]


def copy_model(model: nn.Module, replaced: Mapping[int, nn.Module] | None = None) -> nn.Module:
    """A deep copy of a network; nothing is shared with the original.

    Args:
        model: The network.
        replaced: Modules that stand in the copy for others, by the `id` of what they stand for.

    Raises:
        DataError: If a layer is lazy and has no weight yet.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise DataError(f"'{name}': a lazy layer without a weight yet; run the network once on an input first")
    memo: dict[int, Any] = dict(replaced or {})
    for module in model.modules():
        for value in vars(module).values():
            # What a hook computed (weight norm of the old kind) has a history, which deepcopy refuses; it is computed
            # anew in every forward pass.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def layer_weight(model: nn.Module, info: LayerInfo) -> Tensor:
    """The weight of a layer as (G, F, C, *kernel), F the out-channels of a group."""
    module: Any = model.get_submodule(info.name)
    return dense_weight(module).detach()


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """A deep copy of the network with the named layers replaced; nothing is shared with the original."""
    # Telling deepcopy that a layer is already copied puts the new one wherever the old one stood, at no cost.
    return copy_model(model, {id(model.get_submodule(name)): layer for name, layer in layers.items()})


def kronecker_layers(model: nn.Module) -> dict[str, KroneckerLayer]:
    """The replaced layers of a network, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, KroneckerLayer)}


def layer_like(model: nn.Module, name: str, structure: Structure, **how: Unpack[HowToRun]) -> KroneckerLayer:
    """A layer of zeros that can stand in the place of a network's dense layer: to set factors, or load a state dict.

    Raises:
        UnsupportedLayerError: If the layer is not of a class that can be replaced.
        StructureError: With the layer's name, if the structure does not fit.
    """
    module: Any = model.get_submodule(name)
    if type(module) not in REPLACEMENTS:
        expected = class_names(*REPLACEMENTS)
        raise UnsupportedLayerError(f"layer '{name}': expected {expected}, got {type(module).__name__}")
    try:
        return REPLACEMENTS[type(module)].like(module, structure, **how)
    except StructureError as error:
        raise StructureError(f"layer '{name}': {error}") from None


def run_model(model: nn.Module, inputs: Inputs) -> Any:
    """The network's output, with a `DataError` that names the input shapes where it fails."""
    try:
        return model(*inputs)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise DataError(
            f"the network does not run on inputs of shapes [{shapes(inputs)}]: {type(error).__name__}: {error}. "
            "Check the shape of the example input and of the data; where the network takes several arguments, they "
            "are a tuple, and what a dataset gives for a sample is (that tuple, target)"
        ) from error


class _PlainOutputs(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any) -> Any:
        return as_plain(self.network(*inputs))


@torch.no_grad()
def with_plain_outputs(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The network itself, or one around it whose outputs are in dictionaries, lists and tuples, as tracers want them.

    Args:
        model: In evaluation mode.
        inputs: It is run on them once.
    """
    return model if is_plain(model(*inputs)) else _PlainOutputs(model).train(model.training)


class _Reached(Exception):
    """Ends a forward pass at a layer."""


def run_until(model: nn.Module, inputs: Inputs, name: str | None) -> Any:
    """Run a network up to a layer: what the layer gets as its input; the output of the whole network if None."""
    if name is None:
        return model(*inputs)
    seen: list[Any] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(stop)
    try:
        model(*inputs)
    except _Reached:
        return seen[0]
    finally:
        handle.remove()
    raise DataError(f"layer '{name}' was not reached by the network on these inputs, though it was on the example")


def output_tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors in a network's output, however they are nested: see `nested.parts`."""
    return [tensor for tensor in tensors(output) if tensor.is_floating_point()]


def is_finite(output: Any) -> bool:
    """Whether no floating-point tensor in a network's output holds NaN or infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in output_tensors(output))
