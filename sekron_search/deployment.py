"""A compressed network as plain PyTorch: no layer of this package in it, batch-norms folded, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sekron_search.errors import DataError
from sekron_search.inspection import absorbing_norms
from sekron_search.kron.dense import AXES, filled
from sekron_search.kron.geometry import Size
from sekron_search.kron.layer import KroneckerLayer
from sekron_search.kron.plain import fold_norm, folds_norm, plain_layer
from sekron_search.model import Inputs, as_inputs, copy_model, kronecker_layers, output_tensors, replace_layers

#: Batch-norms whose forward is known; a subclass may do something else.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

#: So many times the rounding of half precision may add up to, as through layers whose norms are folded.
ROUNDINGS = 8


def deploy(model: nn.Module, example_inputs: Any, *, tolerance: float = 1e-5) -> nn.Module:
    """A copy of a network, in evaluation mode, that runs without this package.

    Every replaced layer becomes modules of torch alone. A batch-norm that takes the whole output of a layer is folded
    into the layer's weight and bias, and `nn.Identity` stands in its place. The network's own code is not traced: it
    runs as before. Where it asks a transposed convolution for an output size, the output padding that gives that size
    for the example inputs becomes the layer's own.

    Args:
        model: The network; it is not changed.
        example_inputs: What it takes: a tensor, or a tuple of positional arguments.
        tolerance: Largest difference of an output on the example inputs, relative to the largest entry of that output;
            in half precision what its rounding makes up, if that is more.

    Raises:
        DataError: If an output differs by more, with the first layer whose output does.
    """
    inputs, model = as_inputs(example_inputs), copy_model(model).eval()
    norms = {n: norm for n, norm in absorbing_norms(model, inputs).items() if _can_fold(model, n, norm)}
    replaced: dict[str, nn.Module] = {}
    paddings = _output_paddings(model, inputs)
    for name, layer in kronecker_layers(model).items():
        norm = model.get_submodule(norms[name]) if name in norms else None
        replaced[name] = plain_layer(layer, norm, paddings.get(name))
    for name, norm_name in norms.items():
        if name not in replaced:
            with torch.no_grad():
                replaced[name] = fold_norm(model.get_submodule(name), model.get_submodule(norm_name))
        replaced[norm_name] = nn.Identity()
    deployed = replace_layers(model, replaced).eval()
    for name, module in deployed.named_modules():
        if type(module).__module__.startswith("sekron_search.kron"):
            raise DataError(
                f"layer '{name}': {type(module).__name__} has no form in plain PyTorch; it cannot be deployed"
            )
    _check_outputs(model, deployed, inputs, norms, tolerance)
    return deployed


def _can_fold(model: nn.Module, name: str, norm_name: str) -> bool:
    """Whether a batch-norm does nothing but normalise, and its layer takes it up exactly."""
    layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
    if type(norm) not in _NORMS or norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm):
        return False
    return folds_norm(layer) if isinstance(layer, KroneckerLayer) else True


def _output_paddings(model: nn.Module, inputs: Inputs) -> dict[str, Size]:
    """Output padding that every transposed replaced layer runs with, by name.

    Raises:
        DataError: If a layer runs with several.
    """
    found: dict[str, Size] = {}

    def keep(name: str, layer: KroneckerLayer) -> Any:
        axes = AXES[layer.kind]

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            size = filled(tuple(args[0].shape[-axes:]), layer.kind, 1)
            least = layer.geometry.transposed_size(size, layer.structure.kernel, (0,) * len(size))
            padding = tuple(n - m for n, m in zip(output.shape[-axes:], least, strict=False))
            if found.setdefault(name, padding) != padding:
                raise DataError(
                    f"layer '{name}': it is asked for output sizes that need the output paddings {found[name]} and "
                    f"{padding}; a deployed transposed convolution has one"
                )

        return hook

    transposed = {name: layer for name, layer in kronecker_layers(model).items() if layer.geometry.transposed}
    _run_hooked(model, inputs, {name: keep(name, layer) for name, layer in transposed.items()})
    return found


def _check_outputs(
    model: nn.Module, deployed: nn.Module, inputs: Inputs, norms: Mapping[str, str], tolerance: float
) -> None:
    with torch.no_grad():
        expected = output_tensors(model(*inputs))
        difference = relative_difference(expected, output_tensors(deployed(*inputs)))
    tolerance = at_least_rounding(tolerance, [*expected, *model.parameters()])
    if difference <= tolerance:
        return
    raise DataError(
        f"the deployed network's outputs differ by {difference:.1e} of the largest, more than the tolerance "
        f"{tolerance:.1e}, {_where(model, deployed, inputs, norms, tolerance)}; raise the tolerance if that is the "
        "rounding of a deep network, or run the network in float64"
    )


def at_least_rounding(tolerance: float, tensors: Iterable[Tensor]) -> float:
    """A tolerance of a network's relative differences, or what rounding in half precision makes up, if that is more.

    Args:
        tolerance: What is asked for.
        tensors: The network's parameters and outputs.
    """
    half = {tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.element_size() < 4}
    return max([tolerance, *(ROUNDINGS * torch.finfo(dtype).eps for dtype in half)])


def relative_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference of two networks' outputs, relative to the largest entry of the output it is in.

    Infinite if they do not have the same shapes, or differ in where they are NaN.
    """
    worst = 0.0 if len(expected) == len(found) else float("inf")
    for a, b in zip(expected, found, strict=False):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() == 0 or torch.equal(a, b.to(a.device)):
            continue
        ratio = float((a - b.to(a.device)).abs().max() / a.abs().max())
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def _where(model: nn.Module, deployed: nn.Module, inputs: Inputs, norms: Mapping[str, str], tolerance: float) -> str:
    """The first layer whose output differs; a layer with a batch-norm in it is compared after it."""
    names = [*kronecker_layers(model), *(name for name in norms if name not in kronecker_layers(model))]
    expected = _layer_outputs(model, inputs, {norms.get(name, name): name for name in names})
    found = _layer_outputs(deployed, inputs, {name: name for name in names})
    for name, output in expected.items():
        if (difference := relative_difference([output], [found[name]])) > tolerance:
            return f"first at layer '{name}' (by {difference:.1e})"
    return "though no layer's own output does"


def _layer_outputs(model: nn.Module, inputs: Inputs, watched: Mapping[str, str]) -> dict[str, Tensor]:
    """Outputs of modules in running order, by the names that are to be given to them."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs.setdefault(name, output)

        return hook

    _run_hooked(model, inputs, {name: keep(given) for name, given in watched.items()})
    return outputs


def _run_hooked(model: nn.Module, inputs: Inputs, hooks: Mapping[str, Any]) -> None:
    """Run a network with forward hooks on some of its modules."""
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
