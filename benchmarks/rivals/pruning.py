"""Structured pruning by Torch-Pruning. The only module that imports it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from benchmarks.rivals.subject import Subject
from sekron_search.costs.traced import traced_flops
from sekron_search.kron.enumeration import largest_where
from sekron_search.model import copy_model

#: Share of a group's channels that are taken away to see whether that is done right, and how near is right.
TRIED, NEAR = 0.25, 1e-3


@torch.enable_grad()
def prune(network: nn.Module, inputs: Tensor, share: float, *, seed: int = 0) -> nn.Module:
    """Takes channels away whose weights are the smallest, over all layers, until the flops are met.

    The importance of a channel is the group magnitude (squared weights of all layers coupled to it, averaged, relative
    to the group's mean). Channels are coupled as Torch-Pruning's dependency graph says, where that is right: a group
    is pruned only if, on trial, taking some of its channels away gives what the network gives with them set to zero.
    That leaves the network's outputs alone, channels before a pixel shuffle, sums with padded shortcuts, grouped
    convolutions that are not depthwise, transposed ones, and normalisations over channels. Of every group one channel
    stays.

    Args:
        network: It is not changed.
        inputs: (N, C, H, W), what flops are counted on.
        share: Of the network's flops that may stay, in (0, 1].
        seed: Of the channels on trial.

    Raises:
        ConfigError: If the share is none.
        InfeasibleBudgetError: If one channel per group needs more flops.

    Source: Fang et al. 2023, DepGraph: towards any structural pruning; Li et al. 2017, Pruning filters for efficient
    ConvNets.
    """
    subject = Subject.of(network, inputs, share)
    subject.network.requires_grad_(True)  # the dependency graph is read from the graph of gradients
    ignored = _wrongly_pruned(subject, seed)
    groups = _groups(subject.network, inputs, ignored)
    # From the least that can stay, one channel per group, to all channels.
    most = sum(groups) - len(groups)

    def with_channels(kept: int) -> nn.Module:
        return _pruned(subject, ignored, most + 1 - kept, sum(groups))

    kept = largest_where(
        lambda kept: traced_flops(with_channels(kept), inputs).total <= subject.allowed,
        most + 1,
    )
    pruned = with_channels(max(kept, 1))
    originals = dict(network.named_parameters(remove_duplicate=False))
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(originals[name].requires_grad)
    return subject.checked(pruned)


def _graph(network: nn.Module, inputs: Tensor) -> Any:
    return torch_pruning.DependencyGraph().build_dependency(network, (inputs,), verbose=False)


def _groups(network: nn.Module, inputs: Tensor, ignored: Iterable[str]) -> list[int]:
    """Number of channels of every group that may be pruned; the library leaves those of one channel alone."""
    copy = copy_model(network)
    layers = [copy.get_submodule(name) for name in ignored]
    found = [len(group[0].idxs) for group in _graph(copy, inputs).get_all_groups(ignored_layers=layers)]
    return [channels for channels in found if channels > 1]


def _pruned(subject: Subject, ignored: Iterable[str], count: int, total: int) -> nn.Module:
    """A copy of the network without the so many least important channels."""
    copy = copy_model(subject.network)
    magnitude = torch_pruning.importance.GroupMagnitudeImportance(p=2)

    def importance(group: Any) -> Tensor:
        # A layer that would lose all its channels is skipped by the library and kept whole: fewer channels would then
        # mean more flops.
        scores: Tensor = magnitude(group)
        scores[scores.argmax()] = torch.inf
        return scores

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside of layers, which are pruned where that is right
        pruner = torch_pruning.pruner.BasePruner(
            copy,
            (subject.inputs,),  # of a tensor it would take the samples for arguments
            importance,
            global_pruning=True,
            pruning_ratio=max(count - 0.5, 0) / max(total, 1),  # in the middle: it is rounded down to channels
            ignored_layers=[copy.get_submodule(name) for name in ignored],
            in_channel_groups={},  # the library's defaults are shared by all its pruners
            out_channel_groups={},
        )
        pruner.step()
    return copy.eval()


def _wrongly_pruned(subject: Subject, seed: int) -> list[str]:
    """Names of layers in groups that the dependency graph does not describe rightly."""
    network, inputs = subject.network, subject.inputs
    generator = torch.Generator().manual_seed(seed)
    names = {module: name for name, module in network.named_modules()}
    wrong: list[str] = []
    for group in list(_graph(network, inputs).get_all_groups()):
        root = names[group[0].dep.target.module]
        count = len(group[0].idxs)
        # Channels at random: the first ones of two layers may fit together by chance.
        chosen = torch.randperm(count, generator=generator)[: max(1, int(TRIED * count))].tolist()
        if not _is_right(network, inputs, root, chosen):
            wrong += [root, *(names[item.dep.target.module] for item in group if _makes_channels(item, names))]
    return sorted(set(wrong))


def _makes_channels(item: Any, names: dict[nn.Module, str]) -> bool:
    module = item.dep.target.module
    return module in names and isinstance(module, nn.Conv2d | nn.Linear) and item.dep.handler in _OUTPUT_PRUNERS


_OUTPUT_PRUNERS = (
    torch_pruning.prune_conv_out_channels,
    torch_pruning.prune_depthwise_conv_out_channels,
    torch_pruning.prune_linear_out_channels,
    torch_pruning.prune_batchnorm_out_channels,
)


@torch.no_grad()
def _is_right(network: nn.Module, inputs: Tensor, root: str, channels: list[int]) -> bool:
    """Whether taking channels away does what setting them to zero does."""
    pruned, zeroed = copy_model(network), copy_model(network)
    names = {module: name for name, module in pruned.named_modules()}
    try:
        with torch.enable_grad():
            graph = _graph(pruned, inputs)
        layer: Any = pruned.get_submodule(root)
        group = graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, channels)
        for item in group:
            if item.dep.handler in _OUTPUT_PRUNERS:
                for parameter in zeroed.get_submodule(names[item.dep.target.module]).parameters(recurse=False):
                    parameter[item.idxs] = 0
        group.prune()
        found = pruned(inputs)
    except Exception:  # whatever goes wrong in a network that was taken apart
        return False
    expected = zeroed(inputs)
    return found.shape == expected.shape and float((found - expected).norm()) <= NEAR * float(expected.norm())
