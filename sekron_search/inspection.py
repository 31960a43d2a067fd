"""Which layers of a network can be replaced, and why the others cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sekron_search.errors import DataError, UnsupportedLayerError
from sekron_search.kron.dense import AXES, dense_geometry, dense_weight, filled, image_size, layer_kind
from sekron_search.kron.layer import KroneckerLayer
from sekron_search.model import (
    REPLACEMENTS,
    Inputs,
    LayerInfo,
    OutputShift,
    as_inputs,
    batch_size,
    is_finite,
    output_tensors,
    run_model,
)
from sekron_search.nested import hidden_tensors, leaves

_REPLACEABLE = tuple(REPLACEMENTS)
_NORMS = (nn.modules.batchnorm._BatchNorm,)


#: Modules that do not call these layers of theirs: in evaluation mode a fused kernel takes their weights.
_READERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
    nn.MultiheadAttention: ("out_proj",),
}

#: Modules of torch whose weights lie in parameters of other names, and what is said of them.
_PACKED: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "its projections are packed into one weight that a fused kernel reads",
    nn.RNNBase: "recurrent layers are not factorized",
}


@dataclass(frozen=True)
class SkippedLayer:
    """A layer with a weight matrix that is left alone, and why."""

    name: str
    type: str
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What a network offers: layers that can be replaced, in running order, and those that cannot."""

    layers: tuple[LayerInfo, ...]
    skipped: tuple[SkippedLayer, ...]


def inspect_model(model: nn.Module, example_inputs: Any) -> Inspection:
    """Find the layers that can be replaced, by looking at every module and running the network once.

    Args:
        model: The network; it is run in evaluation mode without gradients and left as it was.
        example_inputs: What the network takes: a tensor, or a tuple of positional arguments.

    Raises:
        DataError: If the network does not run on the inputs, or gives NaN or infinity, or a weight holds them.
    """
    inputs = as_inputs(example_inputs)
    samples = batch_size(inputs)
    reasons = {name: _static_reason(module) for name, module in model.named_modules() if _has_weight(module)}
    _mark_shared(model, reasons)
    for name, module in model.named_modules():
        for kind, parts in _READERS.items():
            if isinstance(module, kind):
                for part in parts:
                    reasons[f"{name}.{part}".lstrip(".")] = f"nn.{kind.__name__} reads its weight itself"
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter) or not parameter.is_floating_point():
            continue
        if not bool(torch.isfinite(parameter).all()):
            raise DataError(f"'{name}': the weight holds NaN or infinity; repair the network first")
    calls = _record_calls(model, inputs, [name for name, reason in reasons.items() if reason is None])
    layers, skipped = [], []
    for name, reason in reasons.items():
        module = model.get_submodule(name)
        record = calls.get(name)
        if reason is None and (record is None or record.count == 0):
            reason = "its forward is not called by the network (unused, or its weight is read directly)"
        elif reason is None and record is not None and record.count > 1:
            reason = f"it runs {record.count} times in one forward pass"
        elif reason is None and record is not None and not record.input_shape:
            reason = "it is called with keyword arguments only"
        elif reason is None and record is not None and len(record.input_shape) != _dims(module, record):
            reason = f"it runs on inputs without a batch axis, of shape {record.input_shape}"
        if reason is None and record is not None:
            layers.append((record.position, _layer_info(name, module, record, samples)))
        else:
            skipped.append(SkippedLayer(name, type(module).__name__, str(reason)))
    return Inspection(tuple(info for _, info in sorted(layers, key=lambda item: item[0])), tuple(skipped))


def absorbing_norms(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    """Batch-norms that take a layer's whole output and nothing else, both run once: they can be folded into it.

    Args:
        model, example_inputs: As for `inspect_model`.

    Returns:
        Name of the batch-norm by the name of the layer, which is a replaced one or one that could be.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, KroneckerLayer) or (_has_weight(module) and _static_reason(module) is None)
    }
    calls = _record_calls(model, as_inputs(example_inputs), list(layers))
    names = {module: name for name, module in model.named_modules()}
    return {name: names[record.norm] for name, record in calls.items() if record.norm is not None and record.count == 1}


def _dims(module: nn.Module, record: _Record) -> int:
    """Number of axes that the input of a layer has, its batch among them; a linear layer takes two or more."""
    return 2 + AXES[layer_kind(module)] if AXES[layer_kind(module)] else max(len(record.input_shape), 2)


@dataclass
class _Record:
    count: int = 0
    position: int = 0
    input_shape: tuple[int, ...] = ()
    output: Tensor | None = None
    uses: int = 0
    norm: nn.Module | None = None


def _has_weight(module: nn.Module) -> bool:
    if isinstance(module, tuple(_PACKED)):
        return True
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and "weight" in module._parameters:
        return True
    weight = getattr(module, "weight", None)
    if callable(weight):  # quantized layers and ours hand out their weight through a method
        return "weight" not in module._parameters and type(module).__module__.startswith("torch.")
    return isinstance(weight, Tensor) and weight.dim() >= 2


def _static_reason(module: nn.Module) -> str | None:
    """Why a module with a weight cannot be replaced, as far as the module itself tells."""
    kind = type(module).__name__
    for packed, reason in _PACKED.items():
        if isinstance(module, packed):
            return reason
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "a lazy layer without a weight yet; run the network once first"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized (weight norm, spectral norm, ...); remove the parametrization first"
    if not isinstance(module, _REPLACEABLE):
        return f"{kind} is not a kind of layer that is factorized"
    if type(module) not in _REPLACEABLE:
        return f"{kind} is a subclass whose forward may differ from {_parent(module)}"
    if hasattr(module, "weight_g") or hasattr(module, "weight_orig"):
        return "its weight is computed by a hook (weight norm, spectral norm, pruning)"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module):
        return "it has hooks or a patched forward that a replacement would lose"
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"its weight is {getattr(weight, 'dtype', type(weight).__name__)}, not floating point"
    if weight.is_quantized or weight.layout != torch.strided or type(weight.data) is not Tensor:
        return "its weight is quantized, sparse or a tensor subclass"
    try:
        dense_geometry(module)  # type: ignore[arg-type]
    except UnsupportedLayerError as error:
        return str(error)
    return None


def _parent(module: nn.Module) -> str:
    return next(f"nn.{kind.__name__}" for kind in _REPLACEABLE if isinstance(module, kind))


def _mark_shared(model: nn.Module, reasons: dict[str, str | None]) -> None:
    """Layers whose module or parameter stands in the network under a second name stay as they are."""
    names: dict[int, list[str]] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{owner}.{parameter_name}".lstrip("."))
    for name, reason in reasons.items():
        if reason is not None:
            continue
        for parameter in model.get_submodule(name).parameters(recurse=False):
            others = [n for n in names[id(parameter)] if n.rpartition(".")[0] != name]
            if others:
                reasons[name] = f"it shares a parameter with {others[0]!r}"


def _record_calls(model: nn.Module, inputs: Inputs, names: list[str]) -> dict[str, _Record]:
    records = {name: _Record() for name in names}
    handles = []
    order = iter(range(1 << 30))

    def layer_hook(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            record = records[name]
            record.count += 1
            record.position = next(order)
            record.input_shape = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()
            record.output = output if isinstance(output, Tensor) else None

        return hook

    norm_calls: Counter[nn.Module] = Counter()

    def norm_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        norm_calls[module] += 1
        for record in records.values():
            if args and record.output is args[0] and record.output is not None:
                record.norm = module

    training = {module: module.training for module in model.modules()}
    try:
        for name, module in model.named_modules():
            if name in records:
                handles.append(module.register_forward_hook(layer_hook(name)))
            if isinstance(module, _NORMS) and module.track_running_stats:
                handles.append(module.register_forward_pre_hook(norm_hook))
        with torch.no_grad(), _CountUses(records):
            output = run_model(model.eval(), inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    _check_output(output)
    returned = {id(leaf) for leaf in leaves(output)}
    for name, record in records.items():
        # A batch-norm takes up a shift only if nothing else sees it, if it has the statistics of one input alone, and
        # if its channels are the layer's: those of a linear layer stand last.
        seen_elsewhere = record.uses != 1 or id(record.output) in returned
        if record.norm is not None and (
            seen_elsewhere or norm_calls[record.norm] != 1 or not _channels_first(model.get_submodule(name), record)
        ):
            record.norm = None
    return records


def _check_output(output: Any) -> None:
    """Raise DataError unless there is something finite in a network's output whose change can be measured."""
    if (hidden := hidden_tensors(output)) is not None:
        raise DataError(
            f"the network's output holds tensors in an object of class {hidden}, which nothing here looks into; return "
            "them in dictionaries, tuples, lists or dataclasses"
        )
    if not output_tensors(output):
        raise DataError(
            f"the network returned no floating-point tensor but {type(output).__name__}; nothing to preserve"
        )
    if not is_finite(output):
        raise DataError(
            "the network gives NaN or infinity on the example inputs; check its weights and the inputs' scale"
        )


def _channels_first(module: nn.Module, record: _Record) -> bool:
    """Whether the channels of a layer's output are its second axis."""
    kind = module.kind if isinstance(module, KroneckerLayer) else layer_kind(module)
    return record.output is not None and record.output.dim() == 2 + AXES[kind]


def is_use(result: Any) -> bool:
    """Whether an operation of this result uses the tensors it takes: asking for a shape does not, writing does."""
    return result is None or any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))


class _CountUses(TorchFunctionMode):
    """Counts the operations that take a layer's output."""

    def __init__(self, records: Mapping[str, _Record]) -> None:
        super().__init__()
        self.records = records

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_use(result):
            taken = [id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            for record in self.records.values():
                if record.output is not None:
                    record.uses += id(record.output) in taken
        return result


def _layer_info(name: str, module: Any, record: _Record, samples: int) -> LayerInfo:
    shift: OutputShift = "absorbed" if record.norm is not None else "kept"
    if shift == "kept" and module.bias is not None:
        shift = "correctable"
    kind, geometry = layer_kind(module), dense_geometry(module)
    axes = AXES[kind]
    assert record.output is not None
    seen = record.output.shape if geometry.transposed else record.input_shape
    size = filled(image_size(tuple(seen[len(seen) - axes :]), module), kind, 1)
    applied = prod(record.input_shape[: 1 if axes else -1])
    per_sample = applied / samples if applied % samples else applied // samples
    weight = dense_weight(module)
    dtype = str(weight.dtype).removeprefix("torch.")
    return LayerInfo(name, kind, tuple(weight.shape[1:]), geometry, size, per_sample, shift, dtype)
