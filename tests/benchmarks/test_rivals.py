from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import inf, prod
from typing import Any

import numpy as np
import pytest
import tensorly
import torch
from torch import Tensor, nn

from benchmarks.cifar10.mobilenet import MobileNetV2
from benchmarks.cifar10.resnet import ResNet20
from benchmarks.cifar10.vgg import Vgg
from benchmarks.rivals import alds, gkpd, pruning, uniform
from benchmarks.rivals.methods import RIVALS
from benchmarks.rivals.subject import (
    STEPS,
    Fitter,
    Rule,
    Subject,
    decomposed,
    same_everywhere,
)
from benchmarks.super_resolution.network import Edsr
from sekron_search.costs.analytic import layer_cost
from sekron_search.costs.traced import traced_flops
from sekron_search.errors import ConfigError, InfeasibleBudgetError
from sekron_search.kron.dense import dense_weight
from sekron_search.kron.layer import KroneckerLayer
from sekron_search.model import kronecker_layers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

DECOMPOSITIONS = [name for name, rival in RIVALS.items() if not rival.afresh and name != "structured pruning"]

#: Factories of small networks by width, and the spatial size of their inputs.
NETWORKS: dict[str, tuple[Callable[[float], nn.Module], int]] = {
    "residual, padded shortcuts": (lambda width: ResNet20(0.5 * width), 16),
    "plain": (lambda width: Vgg(0.25 * width), 16),
    "depthwise": (lambda width: MobileNetV2(0.5 * width), 16),
    "image to image": (lambda width: Edsr(width / 4, 2), 8),
}


def weight_errors(network: nn.Module, compressed: nn.Module) -> dict[str, float]:
    """|W - W^| / |W| of every layer that was decomposed, by name.

    Args:
        network: The original.
        compressed: Made from it by decompositions; layers that lost channels have no such error and are left out.
    """
    errors = {}
    for name, dense_layer in network.named_modules():
        if type(dense_layer) not in (nn.Conv2d, nn.Linear):
            continue
        new = compressed.get_submodule(name)
        approximation = getattr(new, "weight", None)
        if type(new) is type(dense_layer) or not isinstance(approximation, Tensor):
            continue
        weight = dense_weight(dense_layer).detach().double().flatten()
        errors[name] = float((weight - approximation.detach().double().flatten()).norm() / weight.norm())
    return errors


def network_of(name: str) -> tuple[nn.Module, Tensor]:
    """A network whose batch-norms do something, and inputs."""
    factory, size = NETWORKS[name]
    network = factory(1.0)
    inputs = torch.randn(4, 3, size, size)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
        network.train()(inputs)
    return network.eval(), inputs


def compress(rival: str, network: nn.Module, inputs: Tensor, share: float, name: str) -> nn.Module:
    found = RIVALS[rival]
    extra: dict[str, Any] = {"factory": NETWORKS[name][0]} if found.afresh else {}
    if rival == "uniform CP":
        extra["sweeps"] = 5
    return found.compress(network, inputs, share, **extra)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rival", RIVALS)
def test_the_flops_are_kept_and_used(rival: str, name: str) -> None:
    network, inputs = network_of(name)
    network.train()
    before = {key: t.clone() for key, t in network.state_dict().items()}
    found = compress(rival, network, inputs, 0.5, name)
    assert network.training
    assert all(torch.equal(before[key], t) for key, t in network.state_dict().items())
    assert not any(module.training for module in found.modules())
    shares = {id(p) for p in network.parameters()} & {id(p) for p in found.parameters()}
    assert shares == set()
    assert all(p.requires_grad for p in found.parameters())
    share = traced_flops(found, inputs).total / traced_flops(network, inputs).total
    assert 0.85 * 0.5 <= share <= 0.5
    with torch.no_grad():
        assert found(inputs).shape == network.eval()(inputs).shape


@pytest.mark.parametrize("rival", RIVALS)
def test_what_cannot_be_reached_is_refused(rival: str) -> None:
    network, inputs = network_of("plain")
    with pytest.raises(InfeasibleBudgetError, match="this method reaches") as caught:
        compress(rival, network, inputs, 1e-5, "plain")
    least = caught.value.best["flops"] / traced_flops(network, inputs).total
    assert 1e-5 < least < 0.5
    again = compress(rival, network, inputs, least * 1.0001, "plain")
    assert traced_flops(again, inputs).total == pytest.approx(caught.value.best["flops"])
    with pytest.raises(ConfigError, match=r"in \(0, 1\], got 1.5"):
        compress(rival, network, inputs, 1.5, "plain")


@pytest.mark.parametrize("rival", [*DECOMPOSITIONS, "structured pruning"])
def test_nothing_is_lost_where_nothing_must_go(rival: str) -> None:
    network, inputs = network_of("residual, padded shortcuts")
    with torch.no_grad():
        torch.testing.assert_close(compress(rival, network, inputs, 1.0, "")(inputs), network(inputs))


RULES: dict[str, tuple[Rule, Fitter]] = {
    "Tucker-2": (uniform._tucker2_rule, uniform._tucker2_factors),
    "spatial SVD": (uniform._spatial_rule, uniform.svd_factors),
    **{f"GKPD {c}": (c.structure, uniform.svd_factors) for c in gkpd.CONFIGURATIONS},
}


@pytest.mark.parametrize("name", ["residual, padded shortcuts", "image to image"])
@pytest.mark.parametrize("rule", RULES)
def test_full_ranks_reconstruct_the_network(rule: str, name: str) -> None:
    network, inputs = network_of(name)
    subject = Subject(network.double(), inputs.double(), 1.0, inf)
    of, fit = RULES[rule]
    found = decomposed(subject, {info.name: of(info, 1.0) for info in subject.inner_layers}, fit)
    assert len(kronecker_layers(found)) == len(subject.inner_layers)
    with torch.no_grad():
        torch.testing.assert_close(found(subject.inputs), network(subject.inputs))
    assert max(weight_errors(network, found).values()) < 1e-6


@pytest.mark.parametrize("rival", ["uniform Tucker-2", "uniform CP"])
def test_weights_are_tensorlys(rival: str) -> None:
    network, inputs = network_of("residual, padded shortcuts")
    found = RIVALS[rival].compress(network, inputs, 0.25)
    layers = kronecker_layers(found)
    assert len(layers) > 6
    for name, layer in list(layers.items())[::3]:
        weight = network.get_submodule(name).get_parameter("weight").detach().double().numpy()
        ranks = list(layer.structure.rank_sizes.values())
        if rival == "uniform CP":
            expected = tensorly.cp_to_tensor(
                tensorly.decomposition.parafac(
                    weight, rank=ranks[0], init="svd", random_state=0, n_iter_max=uniform.CP_SWEEPS
                )
            )
        else:
            tucker, _ = tensorly.decomposition.partial_tucker(weight, rank=ranks, modes=[0, 1])
            expected = tensorly.tenalg.multi_mode_dot(*tucker, modes=[0, 1])
        np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rule", [uniform._tucker2_rule, uniform._cp_rule, uniform._spatial_rule])
def test_the_largest_number_is_found_that_fits(rule: Rule) -> None:
    network, inputs = network_of("plain")
    subject = Subject.of(network, inputs, 0.5)
    found = same_everywhere(subject, rule)

    def flops(step: int) -> float:
        total = subject.flops
        for info in subject.inner_layers:
            whole = prod(info.weight_shape) * prod(info.input_size)
            total += min(0, layer_cost(rule(info, step / STEPS), info).flops - whole)
        return total

    fitting = [step for step in range(1, STEPS + 1, 16) if flops(step) <= subject.allowed]
    best = max(flops(step) for step in fitting)
    infos = {info.name: info for info in subject.inner_layers}
    saved = sum(prod(i.weight_shape) * prod(i.input_size) - layer_cost(found[n], i).flops for n, i in infos.items())
    assert best <= subject.flops - saved <= subject.allowed


def test_first_and_last_layers_and_depthwise_ones_stay_dense() -> None:
    network, inputs = network_of("depthwise")
    for rival in ("uniform Tucker-2", "uniform CP", "uniform spatial SVD", "GKPD"):
        found = RIVALS[rival].compress(network, inputs, 0.6)
        assert isinstance(found.get_submodule("features.0"), nn.Conv2d)
        assert isinstance(found.get_submodule("linear"), nn.Linear)
        depthwise = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        assert depthwise
        assert all(isinstance(found.get_submodule(n), nn.Conv2d) for n in depthwise)


def test_spatial_svd_has_the_error_of_its_spectrum() -> None:
    network, inputs = network_of("plain")
    found = RIVALS["uniform spatial SVD"].compress(network, inputs, 0.5)
    errors = weight_errors(network, found)
    assert errors.keys() == kronecker_layers(found).keys()
    for name, error in errors.items():
        layer = found.get_submodule(name)
        assert isinstance(layer, KroneckerLayer)
        weight = network.get_submodule(name).get_parameter("weight").detach().double()
        values = torch.linalg.svdvals(weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)).square()
        (rank,) = layer.structure.rank_sizes.values()
        assert error == pytest.approx(float((values[rank:].sum() / values.sum()).sqrt()), abs=1e-5)


def test_gkpd_takes_the_configuration_of_least_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gkpd, "CONFIGURATIONS", gkpd.CONFIGURATIONS[::4])
    network, inputs = network_of("residual, padded shortcuts")
    subject = Subject.of(network, inputs, 0.5)
    errors = []
    for configuration in gkpd.CONFIGURATIONS:
        try:
            structures = same_everywhere(subject, configuration.structure)
        except InfeasibleBudgetError:
            continue
        errors.append(sum(weight_errors(network, decomposed(subject, structures, uniform.svd_factors)).values()))
    chosen = sum(weight_errors(network, gkpd.gkpd(network, inputs, 0.5)).values())
    assert chosen == pytest.approx(min(errors), rel=1e-4)
    assert chosen < 0.98 * max(errors)


@pytest.mark.parametrize(("subspaces", "rank", "exact"), [(1, 8, True), (3, 8, True), (6, 8, True), (3, 4, False)])
def test_subspaces_of_full_rank_are_the_convolution(subspaces: int, rank: int, exact: bool) -> None:
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2, padding_mode="reflect").double()
    found = alds.subspace_conv(conv, subspaces, rank)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    assert torch.allclose(found(x), conv(x)) == exact
    assert torch.allclose(found.weight, conv.weight) == exact


def test_subspaces_keep_to_their_bound() -> None:
    """Relative to the spectral norm it is at most sqrt(k) times the bound (Liebenwein et al. 2021, Theorem 1)."""
    conv = nn.Conv2d(6, 8, 3, padding=1)
    network, inputs = nn.Sequential(conv), torch.randn(1, 6, 5, 5)
    subject = Subject.of(network, inputs, 1.0)
    spectra = alds.Spectra.of(subject, subject.layers[0])
    matrix = conv.weight.detach().flatten(1)
    for k in (1, 2, 3, 6):
        for rank in (1, 3, 7):
            found = alds.subspace_conv(conv, k, rank)
            off = torch.linalg.matrix_norm(matrix - found.weight.detach().flatten(1), 2)
            error = float(off / torch.linalg.matrix_norm(matrix, 2))
            assert spectra.errors[k][rank] - 1e-5 <= error <= k**0.5 * spectra.errors[k][rank] + 1e-5
            counted = traced_flops(nn.Sequential(found), inputs).total
            assert counted == rank * spectra.each[k]


def test_the_global_step_of_alds_is_optimal() -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 5)).eval()
    subject = Subject.of(network, torch.randn(1, 3, 6, 6), 0.5)
    layers = [alds.Spectra.of(subject, info) for info in subject.layers]
    subspaces = [1, 2, 1]
    found = alds._global_step(layers, subspaces, subject.allowed)
    assert found is not None

    def error(layer: alds.Spectra, k: int, rank: int) -> float:
        return 0.0 if rank * layer.each[k] >= layer.dense else float(layer.errors[k][rank])

    best = inf
    for ranks in product(*(range(1, len(lay.errors[k])) for lay, k in zip(layers, subspaces, strict=True))):
        own = list(zip(layers, subspaces, ranks, strict=True))
        if sum(layer.flops(k, rank) for layer, k, rank in own) <= subject.allowed:
            best = min(best, max(error(*item) for item in own))
    reached = max(error(*item) for item in zip(layers, subspaces, found.ranks, strict=True))
    assert best == pytest.approx(reached)


def test_alds_is_better_than_one_subspace_everywhere() -> None:
    network, inputs = network_of("residual, padded shortcuts")
    subject = Subject.of(network, inputs, 0.3)
    layers = [alds.Spectra.of(subject, info) for info in subject.layers]
    budget = subject.allowed - (subject.flops - sum(layer.dense for layer in layers))
    plain = alds._global_step(layers, [1] * len(layers), budget)
    assert plain is not None
    choices = [alds._alternate(layers, start, budget) for start in alds._starts(layers, 0)]
    assert min(choice.error for choice in choices if choice is not None) <= plain.error
    found = alds.alds(network, inputs, 0.3)
    several = [name for name, module in found.named_modules() if isinstance(module, alds.Subspaces)]
    assert several
    assert weight_errors(network, found).keys() == {*several, *kronecker_layers(found)}


def test_channels_tied_by_padded_shortcuts_stay() -> None:
    network, inputs = network_of("residual, padded shortcuts")
    found = RIVALS["structured pruning"].compress(network, inputs, 0.5)
    kept = {n: m.out_channels for n, m in found.named_modules() if isinstance(m, nn.Conv2d)}
    had = {n: m.out_channels for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    inner = [n for n in had if n.endswith("conv1") and "." in n]
    assert all(kept[n] == had[n] for n in had if n not in inner)
    assert any(kept[n] < had[n] for n in inner)


def test_channels_tied_by_plain_sums_go_together() -> None:
    network, inputs = network_of("image to image")
    found = RIVALS["structured pruning"].compress(network, inputs, 0.3)
    assert isinstance(found, Edsr)
    tied = [found.head, found.body_end, *(found.get_submodule(f"body.{i}.conv2") for i in range(2))]
    channels = {m.out_channels for m in tied if isinstance(m, nn.Conv2d)}
    assert len(channels) == 1
    assert channels.pop() < 12
    assert found.upsample.out_channels == 48
    assert found.tail.out_channels == 3


def test_what_the_dependency_graph_gets_wrong_is_noticed() -> None:
    residual, inputs = network_of("residual, padded shortcuts")
    assert pruning._is_right(residual, inputs, "layer2.0.conv1", [0, 5])
    assert not pruning._is_right(residual, inputs, "conv1", [0, 5])
    images, inputs = network_of("image to image")
    assert pruning._is_right(images, inputs, "head", [1, 4])
    assert not pruning._is_right(images, inputs, "upsample", [1, 4])
    assert not pruning._is_right(images, inputs, "tail", [1])


def test_pruned_channels_are_the_least_ones() -> None:
    """A network whose dead channels make up half of it loses them first, and nothing else."""
    network, inputs = network_of("plain")
    with torch.no_grad():
        for module in network.get_submodule("features").children():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                for parameter in module.parameters():
                    parameter[::2] = 0
    found = RIVALS["structured pruning"].compress(network, inputs, 0.75)
    with torch.no_grad():
        torch.testing.assert_close(found(inputs), network(inputs), rtol=1e-4, atol=1e-5)


def test_narrower_networks_are_fresh_and_seeded() -> None:
    factory, _ = NETWORKS["residual, padded shortcuts"]
    network, inputs = network_of("residual, padded shortcuts")
    narrower = RIVALS["narrower, from scratch"].compress
    before = torch.get_rng_state()
    first, same, other = (narrower(network, inputs, 0.5, factory=factory, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    pairs = list(zip(first.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_the_residual_network_of_width_one_is_what_it_was() -> None:
    shapes = {n: tuple(p.shape) for n, p in ResNet20().state_dict().items() if n.endswith("weight") and p.dim() == 4}
    assert shapes["conv1.weight"] == (16, 3, 3, 3)
    assert shapes["layer2.0.conv1.weight"] == (32, 16, 3, 3)
    assert shapes["layer3.2.conv2.weight"] == (64, 64, 3, 3)
    x = torch.randn(1, 3, 16, 16)
    assert ResNet20(0.3)(x).shape == (1, 10)  # 5, 10 and 19 channels: nine are added, four before and five after
