from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sekron_search
from sekron_search.costs.analytic import layer_cost
from sekron_search.costs.layers import random_input
from sekron_search.costs.traced import traced_flops
from sekron_search.errors import DataError, StructureError
from sekron_search.inspection import inspect_model
from sekron_search.kron import families as fam
from sekron_search.kron.conv import KroneckerConv
from sekron_search.kron.linear import KroneckerLinear
from sekron_search.model import layer_like, layer_weight, replace_layers
from tests.cases import SmallNet, nan_net, small_net


class Odd(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Zoo(nn.Module):
    """Layers that must be left alone, each for its own reason."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.subclass = Odd(8, 8, 3, padding=1)
        self.normed = parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.also = nn.Conv2d(8, 8, 3, padding=1)
        self.also.weight = self.shared.weight
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.hooked = nn.Conv2d(8, 8, 3, padding=1)
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.unused = nn.Conv2d(8, 8, 3)
        self.transposed = nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.dilated = nn.ConvTranspose2d(8, 8, 3, dilation=2, output_padding=1)
        self.embedding = nn.Embedding(5, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.also(self.shared(self.normed(self.subclass(self.plain(x)))))
        x = self.twice(self.twice(x))
        out: Tensor = self.depthwise(self.transposed(self.hooked(x)))
        return out


def test_layers_are_found_in_running_order() -> None:
    found = inspect_model(small_net(), torch.randn(2, 3, 8, 8))
    assert [info.name for info in found.layers] == ["conv1", "conv2", "conv3", "linear"]
    assert [info.output_shift for info in found.layers] == ["absorbed", "correctable", "absorbed", "correctable"]
    assert found.layers[2].geometry.stride == (2, 2)
    assert found.layers[2].input_size == (8, 8)
    assert found.skipped == ()


def test_what_cannot_be_carried_over_stays_with_a_reason() -> None:
    found = inspect_model(Zoo(), torch.randn(1, 3, 6, 6))
    assert [info.name for info in found.layers] == ["plain", "transposed", "depthwise"]
    reasons = {layer.name: layer.reason for layer in found.skipped}
    expected = {
        "subclass": "subclass",
        "normed": "parametrized",
        "shared": "shares a parameter",
        "also": "shares a parameter",
        "twice": "2 times",
        "hooked": "hooks",
        "unused": "not called",
        "dilated": "output_padding (1, 1) is not smaller than its stride",
        "embedding": "not a kind of layer",
    }
    assert reasons.keys() >= expected.keys()
    for name, word in expected.items():
        assert word in reasons[name], (name, reasons[name])


def test_quantized_and_lazy_layers_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lazy = nn.LazyLinear(4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x)[0]
            return out

    found = inspect_model(Net(), torch.randn(1, 5, 8))
    assert found.layers == ()
    reasons = {layer.name: layer.reason for layer in found.skipped}
    assert "lazy" in reasons["lazy"]
    assert "nn.MultiheadAttention reads its weight itself" in reasons["attention.out_proj"]
    assert "packed into one weight" in reasons["attention"]


def test_replacement_works_on_a_copy() -> None:
    model = small_net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    info = inspect_model(model, x).layers[1]
    layer = layer_like(model, info.name, fam.spatial_svd(info.weight_shape, 2))
    changed = replace_layers(model, {"conv2": layer})
    assert isinstance(changed.get_submodule("conv2"), KroneckerConv)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_replaced_network_computes_what_its_dense_twin_does() -> None:
    model = small_net()
    x = torch.randn(2, 3, 8, 8)
    replaced: dict[str, nn.Module] = {}
    dense: dict[str, nn.Module] = {}
    for info in inspect_model(model, x).layers:
        f, c, h, w = info.weight_shape
        layer = layer_like(model, info.name, fam.sekron([(f, 1, h, 1), (1, c, 1, w)], [2]))
        layer.set_factors([torch.randn_like(a) for a in layer.factors()])
        replaced[info.name] = layer
        assert isinstance(layer, KroneckerConv | KroneckerLinear)
        dense[info.name] = layer.to_conv() if isinstance(layer, KroneckerConv) else layer.to_linear()
    torch.testing.assert_close(replace_layers(model, replaced)(x), replace_layers(model, dense)(x))


def test_errors_name_the_layer() -> None:
    model = small_net()
    info = inspect_model(model, torch.randn(1, 3, 8, 8)).layers[0]
    with pytest.raises(StructureError, match="layer 'conv1'"):
        layer_like(model, info.name, fam.dense((3, 3, 3, 3)))


def test_bad_networks_are_refused() -> None:
    with pytest.raises(DataError, match="NaN or infinity on the example inputs"):
        inspect_model(nan_net(), torch.randn(1, 3, 8, 8))
    with pytest.raises(DataError, match=r"does not run on inputs of shapes \[\(1, 5, 8, 8\)\]"):
        inspect_model(small_net(), torch.randn(1, 5, 8, 8))
    broken = small_net()
    with torch.no_grad():
        broken.conv2.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(DataError, match=r"'conv2\.weight': the weight holds NaN"):
        inspect_model(broken, torch.randn(1, 3, 8, 8))


def test_inspection_leaves_the_network_as_it_was() -> None:
    model = SmallNet().train()
    statistics = model.bn1.running_mean
    assert statistics is not None
    before = statistics.clone()
    inspect_model(model, torch.randn(4, 3, 8, 8))
    assert model.training
    assert torch.equal(before, statistics)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_tokens_of_a_transformer_layer_are_counted() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    first = inspect_model(model, torch.randn(2, 7, 8)).layers[0]
    assert first.positions_per_sample == 7
    assert layer_weight(model, first).shape == (1, 16, 8, 1, 1)


class Latents(nn.Module):
    """Compares what is given with a table of its own; a vector of its own is added."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.vector = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(6))
        self.query, self.key = nn.Linear(16, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.last, self.shift = nn.Linear(4, 5, bias=False), nn.Linear(6, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.query(self.table) * self.key(x).mean(1, keepdim=True)
        out: torch.Tensor = self.last(seen.mean(2)) + self.shift(self.vector)
        return out


def test_layers_on_tables_of_the_network_count_by_what_they_are_of_a_sample() -> None:
    model = Latents()
    x = torch.randn(32, 3, 8)
    found = inspect_model(model, x)
    assert {info.name: info.positions_per_sample for info in found.layers} == {"query": 4 / 32, "key": 3, "last": 1}
    assert [(s.name, s.reason) for s in found.skipped] == [
        ("shift", "it runs on inputs without a batch axis, of shape (6,)")
    ]
    layers = sum(layer_cost(fam.dense(info.weight_shape), info).flops for info in found.layers)
    assert layers + 6 * 5 / 32 == pytest.approx(traced_flops(model, x).total)
    assert random_input(found.layers[0], 32).shape == (4, 16)


@pytest.mark.parametrize(
    ("kind", "shift"),
    [
        ("plain", "absorbed"),
        ("inplace", "kept"),
        ("written", "kept"),
        ("reused", "kept"),
        ("branched", "kept"),
        ("biased", "correctable"),
    ],
)
def test_a_shift_is_absorbed_only_by_a_batch_norm_that_alone_sees_it(kind: str, shift: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, bias=kind == "biased")
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            if kind in ("inplace", "biased"):
                y.relu_()
            if kind == "written":
                y[y < 0] = 0
            out: torch.Tensor = self.norm(y)
            if kind == "reused":
                out = self.norm(out)
            return out + y if kind == "branched" else out

    assert inspect_model(Net(), torch.randn(2, 3, 8, 8)).layers[0].output_shift == shift


def test_layers_that_would_not_run_are_left_alone() -> None:
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4))
    found = inspect_model(encoder, torch.randn(2, 5, 8))
    assert [info.name for info in found.layers] == ["1"]
    assert {s.name for s in found.skipped} >= {"0.linear1", "0.linear2"}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.named, self.single, self.last = nn.Linear(8, 8), nn.Conv2d(1, 8, 1), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(self.named(input=x) + self.single(x[None, 0, None].mT).sum())
            return out

    reasons = {s.name: s.reason for s in inspect_model(Net(), torch.randn(2, 8)).skipped}
    assert "keyword arguments only" in reasons["named"]
    assert "without a batch axis" in reasons["single"]


def test_a_transformers_fused_kernel_gets_the_weights_that_it_reads() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 12)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.memory = nn.LSTM(16, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.memory(self.encoder(self.embed(x)))[0])
            return out

    torch.manual_seed(0)
    network, x = Net().eval(), torch.randn(4, 5, 8)
    found = inspect_model(network, x)
    assert [info.name for info in found.layers] == ["embed", "head"]
    reasons = {s.name: s.reason for s in found.skipped}
    for number in (0, 1):
        own = f"encoder.layers.{number}"
        for name in ("linear1", "linear2"):
            assert reasons[f"{own}.{name}"] == "nn.TransformerEncoderLayer reads its weight itself"
        assert "packed into one weight" in reasons[f"{own}.self_attn"]
    assert reasons["memory"] == "recurrent layers are not factorized"
    # Layers of all ranks, so that nothing is lost: the fused kernel (in evaluation mode, without gradients) and the
    # plain code (with gradients) both have to give the original's outputs.
    full = {i.name: layer_like(network, i.name, fam.channel_svd(i.weight_shape, 16)) for i in found.layers}
    for name, layer in full.items():
        dense: Any = network.get_submodule(name)
        full[name] = KroneckerLinear.from_linear(dense, layer.structure)
    replaced = replace_layers(network, full).eval()
    with torch.no_grad():
        torch.testing.assert_close(replaced(x), network(x), atol=1e-5, rtol=1e-4)
        fused = replaced(x)
    torch.testing.assert_close(replaced(x), fused, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sekron_search.deploy(replaced, x)(x), fused, atol=1e-5, rtol=1e-4)
