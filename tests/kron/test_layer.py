from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sekron_search.errors import DataError, StructureError, UnsupportedLayerError
from sekron_search.kron import families as fam
from sekron_search.kron.conv import KroneckerConv, KroneckerConvTranspose
from sekron_search.kron.dense import ConvTranspose, dense_weight, options
from sekron_search.kron.linear import KroneckerLinear
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure

CONVS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "plain": (nn.Conv2d, {"kernel_size": 3}),
    "stride and padding": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "asymmetric": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "same": (nn.Conv2d, {"kernel_size": 3, "padding": "same"}),
    "same, even kernel": (nn.Conv2d, {"kernel_size": (4, 2), "padding": "same"}),
    "valid": (nn.Conv2d, {"kernel_size": 3, "padding": "valid"}),
    "reflect": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "replicate, same, even": (nn.Conv2d, {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"}),
    "circular": (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "dilation": 2}),
    "groups": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 2}),
    "pointwise, strided": (nn.Conv2d, {"kernel_size": 1, "stride": 2, "padding": 1}),
    "no bias": (nn.Conv2d, {"kernel_size": 3, "bias": False}),
    "1-d": (nn.Conv1d, {"kernel_size": 5, "stride": 2, "padding": 2, "groups": 2}),
    "1-d, same, even, circular": (nn.Conv1d, {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}),
    "1-d, dilated, reflect": (nn.Conv1d, {"kernel_size": 3, "padding": 3, "dilation": 2, "padding_mode": "reflect"}),
    "3-d": (nn.Conv3d, {"kernel_size": (3, 2, 3), "stride": (2, 1, 1), "padding": (1, 0, 2), "dilation": (1, 2, 1)}),
    "3-d, same, groups": (nn.Conv3d, {"kernel_size": (2, 3, 1), "padding": "same", "groups": 2}),
    "3-d, replicate": (nn.Conv3d, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}),
    "transposed": (nn.ConvTranspose2d, {"kernel_size": 3}),
    "transposed, upsampling": (nn.ConvTranspose2d, {"kernel_size": 4, "stride": 2, "padding": 1}),
    "transposed, asymmetric": (
        nn.ConvTranspose2d,
        {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "dilation": (1, 2)},
    ),
    "transposed, groups": (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2, "groups": 2, "bias": False}),
    "transposed, pointwise": (nn.ConvTranspose2d, {"kernel_size": 1, "stride": 2, "output_padding": 1}),
    "transposed, 1-d": (nn.ConvTranspose1d, {"kernel_size": 5, "stride": 3, "padding": 1, "output_padding": 2}),
    "transposed, 3-d": (nn.ConvTranspose3d, {"kernel_size": (2, 3, 1), "stride": 2, "padding": (0, 1, 0), "groups": 2}),
}


def structures_for(dense: Any) -> list[Structure]:
    _, f, c, *kernel = dense_weight(dense).shape
    first, *others = kernel
    ones = [1] * len(others)
    return [
        fam.dense((f, c, *kernel)),
        fam.spatial_svd((f, c, *kernel), 2),
        # Channels that do not divide: padded up with zeros.
        fam.sekron([(3, 4, first, *ones), (-(-f // 3), -(-c // 4), 1, *others)], [2]),
        fam.sekron([(2, 1, 1, *others), (-(-f // 2), 2, first, *ones), (1, -(-c // 2), 1, *ones)], [2, 2]),
    ]


def replacement(dense: Any, structure: Structure, **how: Any) -> Any:
    cls = KroneckerConvTranspose if isinstance(dense, ConvTranspose) else KroneckerConv
    return cls.from_conv(dense, structure, **how)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVS)
def test_layer_equals_its_dense_convolution(name: str) -> None:
    torch.manual_seed(0)
    kind, arguments = CONVS[name]
    conv: Any = kind(10, 14, **arguments).double()
    x = torch.randn(2, 10, *(11, 12, 9)[: len(conv.kernel_size)], dtype=torch.float64)
    for structure in structures_for(conv):
        layer = replacement(conv, structure)
        dense = layer.to_conv()
        assert type(dense) is kind
        for attribute in options(conv):
            assert getattr(dense, attribute) == getattr(layer, attribute) == getattr(conv, attribute)
        torch.testing.assert_close(layer.weight, dense.weight)
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer(x[0]), dense(x[0]), rtol=1e-12, atol=1e-12)
        rebuilt = replacement(conv, structure, execution="dense", factors=layer.factors())
        torch.testing.assert_close(rebuilt(x), dense(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in CONVS if n.startswith("transposed")])
def test_transposed_layers_take_an_output_size(name: str) -> None:
    kind, arguments = CONVS[name]
    conv: Any = kind(10, 14, **arguments).double()
    axes = len(conv.kernel_size)
    x = torch.randn(2, 10, *(5, 4, 3)[:axes], dtype=torch.float64)
    layer = replacement(conv, structures_for(conv)[1])
    dense = layer.to_conv()
    least = [n - extra for n, extra in zip(conv(x).shape[2:], conv.output_padding, strict=True)]
    for size in (least, [n + s - 1 for n, s in zip(least, conv.stride, strict=True)]):
        torch.testing.assert_close(layer(x, output_size=size), dense(x, output_size=size), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer(x, [2, 14, *size]), dense(x, size), rtol=1e-12, atol=1e-12)
    for wrong in ([n - 1 for n in least], [n + s for n, s in zip(least, conv.stride, strict=True)], []):
        with pytest.raises(DataError, match=r"output_size: an input of size \(5.* can give sizes from"):
            layer(x, output_size=wrong)


def test_what_is_no_adjoint_of_a_convolution_is_refused() -> None:
    conv = nn.ConvTranspose2d(4, 4, 3, stride=1, dilation=2, output_padding=1)
    with pytest.raises(UnsupportedLayerError, match=r"output_padding \(1, 1\) is not smaller than its stride \(1, 1\)"):
        KroneckerConvTranspose.from_conv(conv, fam.dense((4, 4, 3, 3)))


def test_dense_structure_keeps_the_convolution() -> None:
    conv = nn.Conv2d(6, 8, 3, padding=1).double()
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(KroneckerConv.from_conv(conv, fam.dense((8, 6, 3, 3)))(x), conv(x))


def test_prime_channels() -> None:
    conv = nn.Conv2d(7, 13, 3, padding=1).double()
    layer = KroneckerConv.from_conv(conv, fam.sekron([(4, 2, 3, 1), (4, 4, 1, 3)], [12]))
    x = torch.randn(1, 7, 6, 6, dtype=torch.float64)
    assert layer(x).shape == conv(x).shape
    torch.testing.assert_close(layer(x), layer.to_conv()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_its_dense_layer(bias: bool) -> None:
    linear = nn.Linear(12, 10, bias=bias).double()
    for structure in (fam.sekron([(2, 3, 1, 1), (5, 4, 1, 1)], [2]), fam.sekron([(3, 5, 1, 1), (4, 3, 1, 1)], [3])):
        layer = KroneckerLinear.from_linear(linear, structure)
        for shape in ((12,), (4, 12), (2, 3, 12)):
            x = torch.randn(*shape, dtype=torch.float64)
            torch.testing.assert_close(layer(x), layer.to_linear()(x), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_reconstructed_convolution() -> None:
    conv = nn.Conv2d(6, 8, 3, padding=1).double()
    layer = KroneckerConv.from_conv(conv, fam.sekron([(2, 3, 3, 1), (4, 2, 1, 3)], [3]))
    twin = copy.deepcopy(layer)
    twin.execution = "dense"
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    for module in (layer, twin):
        module(x).square().sum().backward()
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad)


def test_terms_that_cancel_are_rebuilt_in_the_precision_of_their_factors() -> None:
    conv = nn.Conv2d(6, 8, 3)
    layer = KroneckerConv.from_conv(conv, fam.cp((8, 6, 3, 3), 4), execution="dense")
    with torch.no_grad():  # a pair of terms, a thousand times as large as what they add up to
        factors = [torch.randn_like(a) for a in layer.factors()]
        for a in factors:
            a[:, 1] = a[:, 0]
        factors[0][:, 0] *= 1000
        factors[0][:, 1] *= -999
        layer.set_factors(factors)
    exact = layer.weight.detach()
    with torch.autocast("cpu", torch.bfloat16):
        rebuilt, out = layer.weight.detach(), layer(torch.randn(1, 6, 5, 5))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(rebuilt, exact, rtol=1e-3, atol=1e-3 * float(exact.std()))


def test_dense_execution_follows_changed_factors() -> None:
    conv = nn.Conv2d(6, 8, 3)
    layer = KroneckerConv.from_conv(conv, fam.channel_svd((8, 6, 3, 3), 3), execution="dense")
    x = torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer(x), before)
        layer.weights[0].mul_(2)
        assert not torch.allclose(layer(x), before)
        torch.testing.assert_close(layer(x), layer.to_conv()(x))


def test_weights_can_be_laid_out_channels_last() -> None:
    conv = nn.Conv2d(6, 8, 3, padding=1)
    x = torch.randn(2, 6, 9, 9)
    for structure in (fam.cp((8, 6, 3, 3), 5), fam.tucker((8, 6, 3, 3), [4, 3, 2, 2])):
        layer = KroneckerConv.from_conv(conv, structure)
        expected = layer(x)
        moved: Any = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.testing.assert_close(moved(x.contiguous(memory_format=torch.channels_last)), expected)
        assert all(stored.dim() == 4 for stored in layer.weights)


def test_the_weight_can_be_read_like_that_of_a_dense_layer() -> None:
    linear = nn.Linear(6, 8)
    layer = KroneckerLinear.from_linear(linear, fam.dense((8, 6, 1, 1)))
    torch.testing.assert_close(layer.weight, linear.weight)
    encoder: Any = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    expected = encoder(x)
    encoder.linear1 = KroneckerLinear.from_linear(encoder.linear1, fam.dense((16, 8, 1, 1)))
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), expected)  # torch's fast path reads the weight itself


def test_from_conv_shares_nothing() -> None:
    conv = nn.Conv2d(4, 4, 1)
    before = conv.weight.clone()
    layer = KroneckerConv.from_conv(conv, fam.dense((4, 4, 1, 1)))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(conv.weight, before)
    assert conv.bias is not None
    assert float(conv.bias.detach().abs().sum()) > 0


def test_half_precision_weights_are_fitted() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        conv = nn.Conv2d(6, 8, 3).to(dtype)
        layer = KroneckerConv.from_conv(conv, fam.channel_svd((8, 6, 3, 3), 8))
        assert layer.weights[0].dtype == dtype
        assert float((layer.weight - conv.weight).detach().abs().max()) < 0.02


@pytest.mark.parametrize(
    ("structure", "says"),
    [
        (fam.dense((8, 6, 5, 5)), "kernels must be equal"),
        (fam.dense((4, 6, 3, 3)), "channels at most the structure's"),
    ],
)
def test_wrong_structures_are_refused(structure: Structure, says: str) -> None:
    with pytest.raises(StructureError, match=says):
        KroneckerConv.from_conv(nn.Conv2d(6, 8, 3), structure)


def test_other_layers_are_refused() -> None:
    with pytest.raises(
        UnsupportedLayerError,
        match=r"expected an nn\.Conv1d, nn\.Conv2d or nn\.Conv3d with its weight, got ConvTranspose2d",
    ):
        KroneckerConv.from_conv(nn.ConvTranspose2d(6, 8, 3), fam.dense((8, 6, 3, 3)))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedLayerError, match="LazyConv2d"):
        KroneckerConv.from_conv(nn.LazyConv2d(8, 3), fam.dense((8, 6, 3, 3)))
    with pytest.raises(StructureError, match="kernels must be equal"):
        KroneckerLinear(nn.Linear(6, 8), fam.dense((8, 6, 3, 3)))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(6, 8, 3, padding=1),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Conv3d(6, 8, 3, padding=1),
        nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1),
    ],
    ids=lambda conv: type(conv).__name__,
)
def test_exports_without_einsum(conv: Any) -> None:
    # Channels that do not divide, so that padding and cropping are exported as well.
    shape = tuple(dense_weight(conv).shape[3:])
    layer = replacement(
        conv, fam.sekron([(2, 3, *shape[:1], *[1] * (len(shape) - 1)), (5, 3, 1, *shape[1:])], [3])
    ).eval()
    size = (9, 9, 5)[: len(conv.kernel_size)]
    x = torch.randn(2, 6, *size)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("einsum" in name or "bmm" in name for name in names), names
    more = torch.randn(5, 6, *size)
    torch.testing.assert_close(program.module()(more), layer(more))


def test_ready_weights_are_kept_until_a_factor_changes_and_are_no_part_of_the_layer() -> None:
    structure = Structure.parse("2x2x1x1[a] * 4x4x3x3[a]; a=1")
    layer = KroneckerConv.from_conv(nn.Conv2d(8, 8, 3), structure, schedule=Schedule((0, 1)))
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        before = layer(x)
        assert layer._ready_weights()[0] is layer._ready_weights()[0]
        layer.set_factors([2 * a for a in layer.factors()])
        assert not torch.allclose(layer(x), before)
        assert copy.deepcopy(layer)._ready_cache is None
    with torch.inference_mode():
        made_here = KroneckerConv.from_conv(nn.Conv2d(8, 8, 3), structure, schedule=Schedule((0, 1)))
        assert made_here(x).shape == (1, 8, 3, 3)
