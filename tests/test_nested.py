"""Outputs and inputs of any nesting: taken apart and put together, compared, distilled, exported."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import StackDataset, TensorDataset

import sekron_search
from examples.common import train
from examples.segmentation import Segmenter, drawn, loss
from sekron_search.config import Config
from sekron_search.costs.traced import traced_flops
from sekron_search.curvature import output_curvature
from sekron_search.data import DataBundle, input_batches, to_device, whole_batches
from sekron_search.deployment import deploy
from sekron_search.divergence import check_divergence, divergence, mean_divergence, reference_outputs
from sekron_search.errors import DataError
from sekron_search.exchange import codec, export_network
from sekron_search.inspection import inspect_model
from sekron_search.jobs import job_from_config
from sekron_search.losses import distillation_loss
from sekron_search.model import batch_size, cut, joined, output_tensors, part_of
from sekron_search.nested import as_plain, is_plain, leaves, map_tensors, named_leaves
from sekron_search.progress import Reporter
from sekron_search.run import run
from sekron_search.run_export import export_run
from sekron_search.rundir import RunFolder
from sekron_search.runtimes.registry import make_runtime
from sekron_search.sections import FinetuneConfig
from sekron_search.tensor_files import digest, write_tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::UserWarning"
)
Pair = namedtuple("Pair", ["first", "second"])


@dataclass(frozen=True)
class Record:
    scores: Tensor
    boxes: Any
    note: str = "as it was"


class Boxed:
    """An object with a tensor in it that is no container."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


A, B = torch.randn(2, 3), torch.randn(2, 4)


class Wrapped(MutableMapping[str, Any]):
    """A mapping of the user's: a shallow copy of it shares its items."""

    def __init__(self, **held: Any) -> None:
        self.held, self.note = held, "as it was"

    def __getitem__(self, key: str) -> Any:
        return self.held[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.held[key] = value

    def __delitem__(self, key: str) -> None:
        del self.held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


#: Values of two tensors each, in every kind of container.
VALUES: dict[str, Any] = {
    "tuple": (A, B),
    "list": [A, [B]],
    "dictionary": {"z": A, "a": {"deep": B, "ids": torch.tensor([1, 2])}},
    "ordered dictionary": OrderedDict(z=A, a=(B, None)),
    "mapping": UserDict(z=A, a=B),
    "mapping of the user's": Wrapped(z=A, a=[B]),
    "named tuple": Pair(A, {"b": B}),
    "dataclass": Record(A, [Pair(B, 3)]),
}


@pytest.mark.parametrize("name", VALUES)
def test_every_container_is_taken_apart_and_put_together(name: str) -> None:
    value = VALUES[name]
    found = output_tensors(value)
    assert [id(t) for t in found] == [id(A), id(B)]
    doubled = map_tensors(lambda t: 2 * t, value)
    assert type(doubled) is type(value)
    assert [n for n, _ in named_leaves(doubled)] == [n for n, _ in named_leaves(value)]
    torch.testing.assert_close(output_tensors(doubled), [2 * A, 2 * B])
    assert torch.equal(output_tensors(value)[0], A)  # the value itself stays
    plain = as_plain(value)
    assert is_plain(plain)
    assert [id(t) for t in output_tensors(plain)] == [id(A), id(B)]
    moved = to_device(value, torch.device("cpu"))
    assert digest([moved]) == digest([value])
    assert digest([doubled]) != digest([value])


def test_what_is_no_tensor_stays_and_is_left_out_of_plain_values() -> None:
    value = Record(A, {"n": 3, "t": B})
    changed = map_tensors(torch.zeros_like, value)
    assert (changed.note, changed.boxes["n"]) == ("as it was", 3)
    assert list(as_plain(value)) == ["scores", "boxes"]
    assert list(as_plain(value)["boxes"]) == ["t"]
    assert [leaf for leaf in leaves(value) if not isinstance(leaf, Tensor)] == [3, "as it was"]


def test_keys_that_are_written_alike_are_two() -> None:
    value = {1: A, "1": B}
    assert [id(t) for t in output_tensors(value)] == [id(A), id(B)]
    torch.testing.assert_close(map_tensors(lambda t: 2 * t, value), {1: 2 * A, "1": 2 * B})


def test_empty_outputs_are_equal() -> None:
    empty = torch.zeros(0, 3)
    alone, beside = divergence("mse", A, A + 1), divergence("mse", (A, empty), (A + 1, empty))
    torch.testing.assert_close(beside, alone / 2)


def test_targets_are_cut_where_their_first_axis_is_the_batch() -> None:
    target = {"label": torch.arange(6), "grid": torch.arange(3), "weight": torch.tensor(2.0)}
    found = cut(target, slice(2, 4), 6)
    assert [t.tolist() for t in found.values()] == [[2, 3], [0, 1, 2], 2.0]


def test_targets_of_another_shape_than_their_outputs_are_not_left_out() -> None:
    output, target, config = torch.randn(4, 1), torch.randn(4), FinetuneConfig(label_weight=0.5)
    with pytest.raises(DataError, match=r"an output of shape \(4, 1\) has a target of torch.float32 of shape \(4,\)"):
        distillation_loss("mse", output, output, target, config)
    given = distillation_loss("mse", output, output, target[:, None], config)
    assert float(given) > 0
    nothing = distillation_loss("mse", output, output, target, FinetuneConfig(label_weight=0))
    assert float(nothing) == 0


class Heads(nn.Module):
    """A network with two outputs, in a container that is chosen."""

    def __init__(self, kind: str = "dataclass") -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.scores, self.boxes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.conv(x)).relu()
        scores, boxes = self.scores(h), self.boxes(h)
        made: dict[str, Any] = {
            "dictionary": {"scores": scores, "more": {"boxes": boxes, "best": scores.argmax(1)}},
            "dataclass": Record(scores, [boxes]),
            "named tuple": Pair(scores, boxes),
            "with constants": {"scores": scores, "boxes": boxes, "classes": 4, "name": "heads", "none": None},
            "hidden": {"scores": scores, "boxes": Boxed(boxes)},
        }
        return made[self.kind]


IMAGES = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("kind", ["dictionary", "dataclass", "named tuple", "with constants"])
def test_networks_of_every_output_are_counted_deployed_and_exported(tmp_path: Path, kind: str) -> None:
    network = Heads(kind).eval()
    assert traced_flops(network, IMAGES).total == 64 * (27 * 8 + 8 * 4 + 8 * 2) + 64 * 8 * 2
    plain = deploy(network, IMAGES)
    assert isinstance(plain.get_submodule("norm"), nn.Identity)
    assert type(plain(IMAGES)) is type(network(IMAGES))
    expected = output_tensors(network(IMAGES))
    for name in ("pytorch-eager", "onnxruntime"):
        found = make_runtime(name).compile(network, (IMAGES,)).outputs()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for format in ("pt2", "onnx"):
        path = tmp_path / f"network.{format}"
        assert export_network(network, IMAGES, path, format=format).rel_difference < 1e-5
        opened = codec(format)[1](path.read_bytes(), network(IMAGES))
        torch.testing.assert_close(output_tensors(opened(IMAGES)), expected, atol=1e-5, rtol=1e-5)
        if format == "onnx":  # in the network's own containers, whatever a metric of the user's asks of them
            assert type(opened(IMAGES)) is type(network(IMAGES))


def test_a_layers_output_that_is_returned_in_a_dataclass_keeps_its_batch_norm() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Record:
            y = self.conv(x)
            return Record(self.norm(y), y)

    [info] = inspect_model(Net(), IMAGES).layers
    assert info.output_shift == "correctable"  # what is returned sees a shift that the batch-norm would take up


def test_objects_that_hide_tensors_are_refused() -> None:
    with pytest.raises(DataError, match=r"holds tensors in an object of class Boxed, .* return them in dictionaries"):
        inspect_model(Heads("hidden").eval(), IMAGES)


def test_several_outputs_need_to_be_told_from_logits() -> None:
    outputs = {"a": torch.randn(4, 5), "b": torch.randn(4, 3)}
    with pytest.raises(DataError, match=r"returns 2 tensors, .*'kl' if all of them are logits .* else to 'mse'"):
        check_divergence("kl", outputs, asked_for=False)
    check_divergence("kl", outputs)
    check_divergence("mse", outputs, asked_for=False)
    check_divergence("kl", {"a": outputs["a"], "ids": torch.tensor([1])}, asked_for=False)


def test_outputs_of_changing_shape_are_refused_with_what_to_do() -> None:
    with pytest.raises(DataError, match=r"boxes above a score.*compress it without that step"):
        divergence("mse", {"boxes": torch.randn(3, 4)}, {"boxes": torch.randn(5, 4)})


def test_divergences_are_means_over_the_outputs_and_batches() -> None:
    reference = Record(torch.randn(6, 3), {"b": torch.randn(6, 2), "i": torch.tensor([3])})
    other = map_tensors(lambda t: t + 1, reference)
    each = [divergence("mse", o, r) for o, r in zip(output_tensors(other), output_tensors(reference), strict=True)]
    assert float(divergence("mse", other, reference)) == pytest.approx(float(sum(each) / 2))
    single = torch.tensor([[2.0]])  # one number has no variance; its square takes its place
    assert float(divergence("mse", single + 1, single)) == pytest.approx(0.25)

    class Total(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"total": x.sum(), "values": 2 * x}  # the first output has no batch axis

    network = Total()
    inputs = [(torch.randn(3, 4),), (torch.randn(1, 4),)]
    assert mean_divergence("mse", network, inputs, reference_outputs(network, inputs)) == 0


def test_curvature_weighs_outputs_as_the_divergence_does() -> None:
    class Net(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), scale

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.a(x), "b": self.scale * self.b(x)}

    found = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        network, x = Net(scale), torch.randn(64, 4)
        layers = inspect_model(network, x).layers
        h = output_curvature(network, layers, [(x,)], classes=False)
        found.append(float(h["b"][0].trace() / h["a"][0].trace()))
    assert found[1] == pytest.approx(found[0], rel=1e-4)  # units of an output do not matter


def test_targets_are_those_of_the_outputs_of_their_names() -> None:
    output = {"mask": torch.randn(4, 3), "box": torch.randn(4, 2)}
    targets = {"box": torch.randn(4, 2), "unknown": torch.zeros(4)}
    config = FinetuneConfig(label_weight=1.0)
    expected = divergence("mse", output["box"], targets["box"])
    assert float(distillation_loss("mse", output, output, targets, config)) == pytest.approx(float(expected))
    labels = {"mask": torch.tensor([0, 1, 2, 0])}
    expected = nn.functional.cross_entropy(output["mask"], labels["mask"])
    assert float(distillation_loss("kl", output, output, labels, config)) == pytest.approx(float(expected))
    with pytest.raises(DataError, match=r"none of the targets \(other\) has the name .* of an output \(mask, box\)"):
        distillation_loss("mse", output, output, {"other": torch.zeros(4)}, config)
    assert float(distillation_loss("mse", output, output, {"boxes": "in a file"}, config)) == 0


def test_batches_of_several_arguments_are_cut_and_joined() -> None:
    grid = torch.randn(5, 5)
    batches = [({"x": torch.randn(n, 2), "mask": torch.ones(n)}, grid) for n in (4, 1)]
    assert batch_size(batches[0]) == 4
    part = part_of(batches[0], slice(1, 3))
    assert part[0]["x"].shape == (2, 2)
    assert part[1] is grid
    whole = joined(batches)
    assert whole[0]["x"].shape == (5, 2)
    assert torch.equal(whole[1], grid)
    assert len(whole_batches(batches)) == 1  # a single sample is joined to the batch before
    other = [(torch.randn(2, 3),), (torch.randn(1, 4),)]
    assert len(whole_batches(other)) == 2
    with pytest.raises(DataError, match=r"nothing but the number of samples, got \(2, 3\) and \(1, 4\)"):
        joined(other)


class TwoInputs(nn.Module):
    """Takes a dictionary and a tensor, gives a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(64, 24)

    def forward(self, named: dict[str, Tensor], other: Tensor) -> Record:
        h = torch.cat([self.a(named["x"]), self.b(other)], 1).relu()
        out = self.head(h)
        return Record(out[:, :20], (out[:, 20:],))


def test_calibration_data_of_several_arguments() -> None:
    x, y = torch.randn(10, 16), torch.randn(10, 16)
    sources: list[Any] = [
        (x, y),
        StackDataset(TensorDataset(x, y), cast(Any, torch.zeros(10))),
        [((x[:8], y[:8]), None)],
        (((x[:8], y[:8]), None),),
    ]
    for source in sources:
        first = input_batches(source, 8)[0]
        assert [tuple(t.shape) for t in first] == [(8, 16), (8, 16)]


def test_a_network_of_nested_inputs_and_outputs_is_compressed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = TwoInputs()
    inputs = ({"x": torch.randn(64, 16)}, torch.randn(64, 16))
    options: dict[str, Any] = {
        "budget": {"params": "0.7x"},
        "out": tmp_path / "run",
        "progress": False,
        "calibration_settings": {"refine_steps": 2, "sequential_steps": 2},
        "space": {"max_options": 6, "rank_levels": 4},
        "latency": {"rounds": 1},
    }
    with pytest.raises(DataError, match=r"calibration: the example inputs are 2 arguments .* batch gives 1"):
        sekron_search.compress(network, part_of(inputs, slice(4)), calibration=inputs[0]["x"], **options)
    with pytest.raises(DataError, match="returns 2 tensors"):
        sekron_search.compress(network, part_of(inputs, slice(4)), calibration=inputs, **options)
    again = {**options, "out": tmp_path / "again", "search": {"trials": 2, "divergence": "mse"}}
    found = sekron_search.compress(
        network,
        part_of(inputs, slice(4)),
        calibration=inputs,
        train=[(inputs, network(*inputs))],  # targets in a dataclass
        finetune={"epochs": 1, "candidates": 1, "learning_rate": 1e-3},
        **again,
    )
    assert found.report["budgets"][0]["met"]
    assert isinstance(found.model(*inputs), Record)
    opened = sekron_search.load(found.path, model=TwoInputs())
    assert torch.equal(opened(*inputs).scores, found.model(*inputs).scores)


def drawn_data() -> DataBundle:
    """A data factory: a sample is (image, {"mask": ..., "box": ...})."""
    return DataBundle(drawn(160, seed=0), drawn(32, seed=1), drawn(32, seed=2))


SEGMENTATION = """
model: {factory: "examples.segmentation:Segmenter"}
data: {source: factory, factory: "tests.test_nested:drawn_data"}
metric: "examples.segmentation:mean_iou"
budget: {flops: 0.8x}
space: {max_options: 6, rank_levels: 4}
calibration: {samples: 64, holdout: 64, batch_size: 32, refine_steps: 2, sequential_steps: 2}
search: {trials: 2, divergence: mse}
latency: {batch_size: 4, rounds: 1}
finetune: {epochs: 1, candidates: 1, batch_size: 32, learning_rate: 0.001, loss: "examples.segmentation:loss"}
"""


def test_a_network_of_a_file_with_outputs_in_a_dictionary_is_exported_and_quantized(tmp_path: Path) -> None:
    state = train(Segmenter(), drawn(160, seed=0), loss, epochs=2).state_dict()
    write_tensors(tmp_path / "trained.safetensors", dict(state))
    (tmp_path / "config.yaml").write_text(SEGMENTATION.replace('r"}', 'r", weights: trained.safetensors}', 1))
    folder = RunFolder(tmp_path / "run")
    report = run(job_from_config(Config.load(tmp_path / "config.yaml")), folder, Reporter(), resume=False)
    assert report["budgets"][0]["met"]
    record = export_run(folder, Reporter(), format="onnx", int8=True)
    found = {(row["name"], row["precision"]): row["metric"] for row in record["networks"]}
    assert found["compressed", "float32"] == pytest.approx(report["compressed"]["metric"], abs=0.01)
    assert found["original", "float32"] == pytest.approx(report["original"]["metric"], abs=0.01)
    assert found["compressed", "int8"] > 0.8 * found["compressed", "float32"]
