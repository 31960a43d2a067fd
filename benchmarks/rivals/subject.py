"""What a rival works on: a network, its layers, and the flops that it may keep; and the network it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from sekron_search.costs.analytic import layer_cost
from sekron_search.costs.traced import traced_flops
from sekron_search.errors import ConfigError, InfeasibleBudgetError
from sekron_search.inspection import inspect_model
from sekron_search.kron.enumeration import largest_where
from sekron_search.kron.families import dense
from sekron_search.kron.layer import KroneckerLayer
from sekron_search.kron.projection import balance
from sekron_search.kron.structure import Structure
from sekron_search.model import LayerInfo, copy_model, layer_like, layer_weight, replace_layers

#: A uniform method's one number is a multiple of one over this.
STEPS = 4096

#: Kinds of layers that the rivals' papers decompose.
KINDS = ("conv2d", "linear")

#: From a layer and the one number of a uniform method, in (0, 1], to the structure that the layer gets.
Rule = Callable[[LayerInfo, float], Structure]

#: From a weight (1, F, C, Kh, Kw) in float64 and a structure to factors (1, rank indices, f, c, kh, kw).
Fitter = Callable[[Tensor, Structure], Sequence[Tensor]]


@dataclass(frozen=True)
class Subject:
    """A network and what it may keep.

    Args:
        network: A copy of the one that was given, in evaluation mode.
        inputs: (N, C, H, W), what it is counted on.
        flops: Per sample, as fvcore counts them.
        allowed: Flops per sample that the compressed network may have.
    """

    network: nn.Module
    inputs: Tensor
    flops: float
    allowed: float

    @classmethod
    def of(cls, network: nn.Module, inputs: Tensor, share: float) -> Subject:
        """The subject of a call of a rival.

        Args:
            network: It is not changed.
            inputs: (N, C, H, W).
            share: Of the network's flops, in (0, 1].

        Raises:
            ConfigError: If the share is none.
        """
        if not 0 < share <= 1:
            raise ConfigError(f"share of the flops: expected a number in (0, 1], got {share}")
        copy = copy_model(network).eval()
        flops = traced_flops(copy, inputs).total
        return cls(copy, inputs, flops, share * flops)

    @cached_property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Convolutions and linear layers without groups, in running order."""
        return tuple(
            info
            for info in self._replaceable
            if info.kind in KINDS and info.geometry.groups == 1 and min(info.weight_shape[:2]) > 1
        )

    @cached_property
    def inner_layers(self) -> tuple[LayerInfo, ...]:
        """`layers` without the network's first one and its last one, which uniform methods leave dense."""
        ends = {info.name for info in (*self._replaceable[:1], *self._replaceable[-1:])}
        return tuple(info for info in self.layers if info.name not in ends)

    @cached_property
    def _replaceable(self) -> tuple[LayerInfo, ...]:
        return inspect_model(self.network, self.inputs).layers

    def weight(self, info: LayerInfo) -> Tensor:
        """Of a layer, (1, F, C, Kh, Kw) in float64."""
        return layer_weight(self.network, info).double()

    def infeasible(self, least: float) -> InfeasibleBudgetError:
        """The error of a method that cannot go below so many flops per sample."""
        return InfeasibleBudgetError(
            f"expected at most {self.allowed:.0f} flops per sample ({self.allowed / self.flops:.3f} of the network's); "
            f"this method reaches {least:.0f} ({least / self.flops:.3f}): ask for a larger share",
            {"flops": least},
        )

    def checked(self, compressed: nn.Module) -> nn.Module:
        """The compressed network in evaluation mode.

        Raises:
            InfeasibleBudgetError: If fvcore counts more flops than are allowed.
        """
        counted = traced_flops(compressed.eval(), self.inputs).total
        if counted > self.allowed * (1 + 1e-9):
            raise self.infeasible(counted)
        return compressed


def dense_flops(info: LayerInfo) -> int:
    """Per sample, of a layer as it is."""
    return layer_cost(dense(info.weight_shape), info).flops


def same_everywhere(subject: Subject, rule: Rule) -> dict[str, Structure]:
    """The structures that a rule gives at the largest number that the allowed flops permit.

    A layer stays dense where its structure would not need fewer flops, and is left out then.

    Args:
        subject: Its inner layers get structures.
        rule: Its flops must not fall as the number grows.

    Raises:
        InfeasibleBudgetError: If the smallest number needs too many flops.
    """
    layers = subject.inner_layers

    def at(step: int) -> dict[str, Structure]:
        found = {info.name: rule(info, step / STEPS) for info in layers}
        return {i.name: found[i.name] for i in layers if layer_cost(found[i.name], i).flops < dense_flops(i)}

    def flops(step: int) -> float:
        chosen = at(step)
        kept = [(layer_cost(chosen[i.name], i).flops, dense_flops(i)) for i in layers if i.name in chosen]
        return subject.flops - sum(whole - own for own, whole in kept)

    step = largest_where(lambda step: flops(step) <= subject.allowed, STEPS)
    if step == 0:
        raise subject.infeasible(flops(1))
    return at(step)


def decomposed(subject: Subject, structures: Mapping[str, Structure], fit: Fitter) -> nn.Module:
    """The network with some layers in the form of structures; biases and everything else stay.

    Args:
        subject: The network.
        structures: By name of the layer.
        fit: Makes the factors; their scale is shared out evenly, which does not change the weight.

    Raises:
        InfeasibleBudgetError: If fvcore counts more flops than are allowed.
    """
    layers = {
        info.name: fitted(subject, info, structures[info.name], fit)
        for info in subject.layers
        if info.name in structures
    }
    return subject.checked(replace_layers(subject.network, layers))


@torch.no_grad()
def fitted(subject: Subject, info: LayerInfo, structure: Structure, fit: Fitter) -> KroneckerLayer:
    """One layer in the form of a structure, with the bias of the dense one."""
    factors = balance(structure, fit(subject.weight(info), structure))
    layer = layer_like(subject.network, info.name, structure, schedule=layer_cost(structure, info).schedule)
    layer.set_factors(factors)
    if layer.bias is not None:
        layer.bias.copy_(subject.network.get_submodule(info.name).get_parameter("bias"))
    return layer
