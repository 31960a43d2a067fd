"""What the layers whose weight is a structure share: factors, plan, bias, and the rebuilt weight."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, Self, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.errors import StructureError, UnsupportedLayerError
from sekron_search.kron.dense import (
    AXES,
    KINDS,
    DenseLayer,
    class_names,
    dense_geometry,
    dense_weight,
    filled,
    layer_kind,
    native_weight,
    options,
)
from sekron_search.kron.execute import (
    convolve,
    convolve_transposed,
    execute,
    execute_transposed,
    load_factor,
    ready_weights,
    store_weight,
)
from sekron_search.kron.geometry import ConvGeometry, Size
from sekron_search.kron.plan import best_plan, make_plan
from sekron_search.kron.projection import check_shape, project, reconstruct_batch
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure

Execution = Literal["factored", "dense"]

#: Size of every axis for which the schedule is chosen when the caller gives none; it hardly matters.
NOMINAL_SIZE = 32


class HowToRun(TypedDict, total=False):
    """How a structure runs.

    Args:
        schedule: Of the factors; by default one of fewest flops for `input_size`.
        execution: "factored", the default, runs the factors; "dense" rebuilds the weight: small on disk, dense in
            speed.
        input_size: Spatial size for which the schedule is chosen; a transposed convolution's is that of its output.
    """

    schedule: Schedule | None
    execution: Execution
    input_size: Size | None


class KroneckerLayer(nn.Module):
    """Holds factors as the ready weights of a plan's steps, all zeros at first, and the bias.

    Args:
        dense: The layer whose place it takes: gives channels, kernel, stride and so on, and whether there is a bias;
            it may be on the meta device. It is not changed, and nothing is shared with it.
        structure: The structure of one group's weight; F and C may exceed the group's channels (zero-padded).
        how: See `HowToRun`.

    Raises:
        UnsupportedLayerError: If `dense` is not of a class that this one replaces.
        StructureError: If the structure does not reconstruct the weight of `dense`.
    """

    #: Classes of the dense layers whose place it can take.
    replaces: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __init__(self, dense: DenseLayer, structure: Structure, **how: Unpack[HowToRun]) -> None:
        super().__init__()
        if type(dense) not in self.replaces:
            raise UnsupportedLayerError(
                f"expected an {class_names(*self.replaces)} with its weight, got {type(dense).__name__}"
            )
        execution = how.get("execution", "factored")
        if execution not in ("factored", "dense"):
            raise StructureError(f"expected execution 'factored' or 'dense', got {execution!r}")
        groups, f, c, *kernel = dense_weight(dense).shape
        check_shape((f, c, *kernel), structure)
        self.kind = layer_kind(dense)
        self.options = options(dense)
        self.structure = structure
        for name, value in self.options.items():
            setattr(self, name, value)  # networks may read the attributes of the layer that stood here
        self.out_channels, self.in_channels = groups * f, groups * c
        self.execution = execution
        schedule, geometry = how.get("schedule"), dense_geometry(dense)
        if schedule is None:
            size = filled(tuple(how.get("input_size") or (NOMINAL_SIZE,) * AXES[self.kind]), self.kind, 1)
            self.plan = best_plan(structure, geometry, size)
        else:
            self.plan = make_plan(structure, geometry, schedule)
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(s.stored_shape)) for s in self.plan.steps])
        self.bias = nn.Parameter(torch.zeros(self.out_channels)) if dense.bias is not None else None
        self._ready_cache: tuple[tuple[int | str, ...], list[Tensor]] | None = None

    @classmethod
    def like(cls, dense: DenseLayer, structure: Structure, **how: Unpack[HowToRun]) -> Self:
        """A layer of zeros in the dtype, on the device and in the mode of a dense one: to load a state dict into.

        Args and errors as of the class.
        """
        layer = cls(dense, structure, **how)
        layer.to(dtype=dense.weight.dtype, device=dense.weight.device)
        layer.requires_grad_(dense.weight.requires_grad)
        return layer.train(dense.training)

    @classmethod
    def _fitted(
        cls, dense: DenseLayer, structure: Structure, factors: Sequence[Tensor] | None, **how: Unpack[HowToRun]
    ) -> Self:
        """A layer with the factors (fitted to the weight if None) and the bias of a dense one."""
        layer = cls.like(dense, structure, **how)
        layer.set_factors(project(dense_weight(dense), structure).factors if factors is None else factors)
        if layer.bias is not None and dense.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(dense.bias)
        return layer

    def to_dense(self) -> nn.Module:
        """The dense layer with the reconstructed weight."""
        like = self.weights[0]
        dense = KINDS[self.kind](**self.options, bias=self.bias is not None, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            for name, value in (("weight", self.weight), ("bias", self.bias)):
                if value is not None:
                    dense.get_parameter(name).copy_(value)
        return dense.train(self.training)

    @property
    def geometry(self) -> ConvGeometry:
        """Stride, dilation, zero padding and groups."""
        return self.plan.geometry

    def factors(self) -> list[Tensor]:
        """The factors, of shapes (G, rank indices, f_k, c_k, *kernel_k), in the order of the structure."""
        found: dict[int, Tensor] = {}
        for step, stored in zip(self.plan.steps, self.weights, strict=True):
            shape = (self.geometry.groups, *self.structure.factor_shapes[step.factor])
            found[step.factor] = load_factor(stored, step, shape)
        return [found[k] for k in range(self.structure.num_factors)]

    @torch.no_grad()
    def set_factors(self, factors: Sequence[Tensor]) -> None:
        """Overwrite the factors, given in the shapes of `factors()`."""
        self.structure.check_factors(factors, batched=True)
        for step, stored in zip(self.plan.steps, self.weights, strict=True):
            stored.copy_(store_weight(factors[step.factor], step))

    @property
    def weight(self) -> Tensor:
        """The reconstructed weight, in the layout of the dense layer's."""
        return native_weight(self.group_weights(), self.kind)

    def group_weights(self) -> Tensor:
        """The reconstructed weight of every group, (G, F, C, *kernel), cropped to the layer's channels.

        In the precision of the factors, under autocast too: what is rounded before terms cancel each other remains.
        """
        groups, device = self.geometry.groups, self.weights[0].device.type
        cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if cast else nullcontext():
            full = reconstruct_batch(self.structure, self.factors())
        return full[:, : self.out_channels // groups, : self.in_channels // groups]

    def extra_repr(self) -> str:
        """The structure and how it runs."""
        how = f"schedule={self.plan.schedule}, execution={self.execution!r}, groups={self.geometry.groups}"
        return f"{self.structure}, {how}"

    def _run(self, x: Tensor, output_padding: Size = ()) -> Tensor:
        """From (N, in-channels, *size) to (N, out-channels, *output size), two spatial axes or three."""
        geometry = self.geometry
        groups, axes = geometry.groups, len(geometry.stride)
        if self.execution == "dense":
            (native,) = self._ready_weights()
            weight = native[(..., *[None] * (2 + axes - native.dim()))]
            if geometry.transposed:
                return convolve_transposed(x, weight, self.bias, geometry, output_padding)
            return convolve(x, weight, self.bias, geometry)
        f, own_f = self.structure.weight_shape[0], self.out_channels // groups
        bias: Tensor | None = self.bias
        if bias is not None and own_f < f:
            bias = F.pad(bias.reshape(groups, own_f), (0, f - own_f)).flatten()
        if geometry.transposed:
            out = execute_transposed(self.plan, self._ready_weights(), self._widened(x), bias, output_padding)
        else:
            out = execute(self.plan, self._ready_weights(), self._widened(x), bias, pointwise=self.kind == "linear")
        return out.unflatten(1, (groups, f))[:, :, :own_f].flatten(1, 2) if own_f < f else out

    def _widened(self, x: Tensor) -> Tensor:
        """The input with zeros for the channels that its structure has more than the layer; no name is kept for it."""
        own, wide = self.in_channels // self.geometry.groups, self.structure.weight_shape[1]
        if own == wide:
            return x
        padding = (*[0, 0] * len(self.geometry.stride), 0, wide - own)
        return F.pad(x.unflatten(1, (self.geometry.groups, own)), padding).flatten(1, 2)

    def _ready_weights(self) -> list[Tensor]:
        """The weights that run: those of the steps, or the reconstructed one where the execution is dense.

        Kept between calls without gradients until a factor changes; writing into a factor's `.data` is no change that
        can be seen, use `set_factors`.
        """
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.compiler.is_exporting()
            or self.weights[0].is_inference()  # which have no version
        ):
            return self._made_ready()
        versions = (item for stored in self.weights for item in (id(stored), stored._version, stored.data_ptr()))
        key = (self.execution, *versions)
        if self._ready_cache is None or self._ready_cache[0] != key:
            # Views of parameters that are made in inference mode still ask for gradients.
            made = [w if isinstance(w, nn.Parameter) else w.detach() for w in self._made_ready()]
            self._ready_cache = (key, made)
        return self._ready_cache[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready_cache": None}  # neither pickled nor copied

    def _made_ready(self) -> list[Tensor]:
        return [self.weight] if self.execution == "dense" else ready_weights(self.plan, list(self.weights))
