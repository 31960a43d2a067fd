"""`compress` on networks, data and callbacks of every odd kind: it works, or says in one error what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import sekron_search
from sekron_search.cli import app
from sekron_search.errors import ConfigError, DataError, InfeasibleBudgetError, RunFolderError, SekronError
from sekron_search.inspection import inspect_model
from tests.cases import ImageToImage, OddLayers, SignalNet, VolumeNet, blobs, small_net

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::UserWarning"
)
IMAGES = blobs(64).tensors[0]


def compress(model: nn.Module, out: Path, **options: Any) -> sekron_search.Result:
    defaults: dict[str, Any] = {
        "example_inputs": IMAGES[:2],
        "budget": {"flops": "0.8x"},
        "space": {"rank_levels": 4, "max_options": 24},
        "calibration": IMAGES,
        "progress": False,
        "search": {"trials": 1},
        "calibration_settings": {"refine_steps": 1, "sequential_steps": 0},
        "latency": {"rounds": 1},
        "finetune": {"epochs": 1, "batch_size": 32},
    }
    return sekron_search.compress(model, out=out, **{**defaults, **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"example_inputs": ()}, "first axis is the batch, got nothing"),
        ({"example_inputs": IMAGES[:0]}, r"first axis is the batch, got \(0, 3, 8, 8\)"),
        ({"evaluate": lambda model: "good"}, "evaluate: expected a function that returns a number, got 'good'"),
        ({"evaluate": lambda model: None}, "evaluate: expected a function that returns a number, got None"),
        ({"evaluate": lambda model: float("nan")}, "evaluate: it returned nan; expected a finite number"),
        ({"train": (batch for batch in [(IMAGES, None)])}, "a generator can be gone over once"),
        ({"evaluate": 3}, "evaluate: expected a function of a network that returns a number, got int"),
        ({"evaluate": lambda model: 1 / 0}, "evaluate: it failed: ZeroDivisionError"),
        ({"budget": 0.5}, "budget: expected a mapping such as"),
        ({"example_inputs": IMAGES[:2, :1]}, r"does not run on inputs of shapes \[\(2, 1, 8, 8\)\]"),
        ({"calibration": IMAGES[:1]}, "expected at least two samples, got one"),
        ({"device": "gpu"}, "key 'device': expected a torch device such as 'cpu'"),
        ({"budget": {"flops": True}}, "budget.flops: expected a positive number"),
    ],
)
def test_bad_arguments_are_refused_at_once(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SekronError, match=says):
        compress(small_net(), tmp_path / "run", **options)
    assert not (tmp_path / "run" / "tables").exists()


@pytest.mark.parametrize("value", [lambda: torch.tensor(0.5), lambda: 1, lambda: torch.tensor([0.25]).numpy()[0]])
def test_metrics_of_any_number_type_are_taken(tmp_path: Path, value: Callable[[], Any]) -> None:
    found = compress(small_net(), tmp_path / "run", evaluate=lambda model: value(), train=blobs(64))
    assert type(found.report["compressed"]["metric"]) is float
    assert found.report["metric_name"] == "metric"  # a lambda has no name
    assert found.report["metric_samples"] is None  # nobody knows of how many samples such a number is


def sharpness(network: nn.Module) -> float:
    return 0.5


def bluntness(network: nn.Module) -> float:
    return 0.5


def test_metrics_are_called_by_their_functions_or_as_is_said(tmp_path: Path) -> None:
    found = compress(small_net(), tmp_path / "run", evaluate=bluntness, test=sharpness)
    assert found.report["metric_name"] == "sharpness"
    # A name is no part of what a run is.
    assert compress(small_net(), tmp_path / "run", evaluate=sharpness, test=bluntness, resume=True).path == found.path
    assert compress(small_net(), tmp_path / "b", test=sharpness, metric="psnr").report["metric_name"] == "psnr"


def test_the_report_of_a_network_given_as_an_object_names_what_works_for_it(tmp_path: Path) -> None:
    found = compress(small_net(), tmp_path / "run")
    assert found.report["environment"]["factory"] is not None  # `load` can make it, though commands cannot
    assert found.report["from_config"] is False
    block = (found.path / "report.md").read_text().rpartition("```bash\n")[2].partition("```")[0]
    commands = [line.partition("#")[0].split() for line in block.splitlines()]
    assert [words[:2] for words in commands] == [["sekron-search", name] for name in ("select", "show", "report")]
    known = {"RUN": str(found.path), "N": str(found.report["front"][0]["trial"])}
    for _, *words in commands:
        done = CliRunner().invoke(app, [known.get(word, word) for word in words])
        assert done.exit_code == 0, done.output
    for refused in (
        ["export", known["RUN"], "--format", "safetensors"],
        ["finish", known["RUN"], "--trial", known["N"]],
    ):
        assert isinstance(CliRunner().invoke(app, refused).exception, SekronError)


@pytest.mark.parametrize("outputs", [1, None])
def test_outputs_without_classes_need_mse(tmp_path: Path, outputs: int | None) -> None:
    tail = [nn.Linear(8, 1)] if outputs else [nn.Linear(8, 1), nn.Flatten(0)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *tail)
    with pytest.raises(DataError, match=r"search.divergence is 'kl'.*set search.divergence to 'mse'"):
        compress(model, tmp_path / "a")
    assert compress(model, tmp_path / "b", search={"trials": 1, "divergence": "mse"}).report["budgets"][0]["met"]


KINDS_OF_NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...], set[str]]] = {
    "1-d": (SignalNet, (3, 24), {"first", "down", "up", "head"}),
    "3-d": (VolumeNet, (1, 6, 6, 6), {"first", "second", "head"}),
    "image to image": (ImageToImage, (3, 10, 10), {"down", "middle", "up", "last"}),
    "depthwise and prime channels": (OddLayers, (7, 8, 8), {"spatial", "point", "prime", "head"}),
}


@pytest.mark.parametrize("name", KINDS_OF_NETWORKS)
def test_networks_of_every_kind_of_layer_are_compressed(tmp_path: Path, name: str) -> None:
    build, shape, layers = KINDS_OF_NETWORKS[name]
    model, inputs = build(), torch.randn(48, *shape)
    found = compress(
        model,
        tmp_path / "run",
        example_inputs=inputs[:4],
        calibration=inputs,
        budget={"flops": "0.6x", "latency_ms": "50x", "peak_activation_bytes": "3x"},
        search={"trials": 2, "divergence": "mse"},
        calibration_settings={"refine_steps": 3, "sequential_steps": 3},
        space={"max_options": 6, "rank_levels": 4},
        train=TensorDataset(inputs, model(inputs).detach()),
    )
    assert {layer["name"] for layer in found.report["layers"]} == layers
    assert all(budget["met"] for budget in found.report["budgets"])
    # Batch-norm and pooling are not replaced: what is left of the prediction's error are channels in other orders.
    saved = sum(layer["before"]["flops"] - layer["after"]["flops"] for layer in found.report["layers"])
    assert found.report["original"]["flops"] - found.report["compressed"]["flops"] == saved
    loaded = sekron_search.load(tmp_path / "run", model=build())
    assert torch.equal(loaded(inputs[:5]), found.model(inputs[:5]))
    program = torch.export.export(loaded, (inputs[:5],))
    torch.testing.assert_close(program.module()(inputs[:5]), loaded(inputs[:5]))


def test_layers_not_worth_it_are_left_alone_with_the_reason(tmp_path: Path) -> None:
    images = torch.randn(32, 7, 8, 8)
    found = compress(OddLayers(), tmp_path / "run", example_inputs=images[:2], calibration=images)
    reasons = {s["name"]: s["reason"] for s in found.report["left_alone"]}
    assert reasons == {"scale": "no structure of the search space 'default' is cheaper than the dense layer"}
    assert "- scale (Conv2d): no structure of" in (tmp_path / "run" / "report.md").read_text()
    assert "scale" not in {layer["name"] for layer in found.report["layers"]}


def test_a_network_of_which_nothing_is_worth_it_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), nn.Flatten(), nn.BatchNorm1d(192))
    with pytest.raises(DataError, match=r"no layer can be replaced \('0': no structure of the search space 'default'"):
        compress(model, tmp_path / "run")


def test_a_last_calibration_batch_of_one_sample_is_joined(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 4))
    settings = {"refine_steps": 1, "sequential_steps": 1, "batch_size": 16}
    assert compress(model, tmp_path / "a", calibration=IMAGES[:33], calibration_settings=settings).report
    single = [IMAGES[i : i + 1] for i in range(6)]
    with pytest.raises(DataError, match="give batches of two samples or more"):
        compress(model, tmp_path / "b", calibration=single)


def test_a_network_with_weight_norm_of_the_old_kind_is_left_alone_there(tmp_path: Path) -> None:
    model = small_net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.conv2)
    model(IMAGES)  # leaves a weight with a history, which deepcopy refuses
    found = compress(model, tmp_path / "run")
    assert [(s["name"], "computed by a hook" in s["reason"]) for s in found.report["left_alone"]] == [("conv2", True)]
    assert found.model(IMAGES[:3]).shape == (3, 4)


def test_a_lazy_network_is_told_to_run_first(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    with pytest.raises(DataError, match=r"'0\.weight': a lazy layer without a weight yet; run the network once"):
        compress(model, tmp_path / "a")
    model(IMAGES)
    assert compress(model, tmp_path / "b").report["budgets"][0]["met"]


def test_a_network_that_cannot_be_traced_is_refused_at_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert [s.name for s in inspect_model(quantized, IMAGES[:2]).skipped] == ["4"]
    with pytest.raises(DataError, match=r"flops of the network cannot be counted.*quantize, or convert otherwise"):
        compress(quantized, tmp_path / "run")


def test_frames_folded_into_the_batch_count_for_a_sample(tmp_path: Path) -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.head = nn.Linear(8, 4)

        def forward(self, clip: Tensor) -> Tensor:
            seen = self.conv(clip.flatten(0, 1)).mean((2, 3)).unflatten(0, clip.shape[:2])
            logits: Tensor = self.head(seen.mean(1))
            return logits

    clips = IMAGES.unflatten(0, (16, 4))
    model = Frames()
    assert inspect_model(model, clips[:2]).layers[0].positions_per_sample == 4
    budget = {"flops": "0.6x", "latency_ms": "50x"}
    found = compress(model, tmp_path / "run", example_inputs=clips[:2], calibration=clips, budget=budget)
    predicted = sum(layer["after"]["flops"] for layer in found.report["layers"])
    assert found.report["compressed"]["flops"] == pytest.approx(predicted, rel=0.05)
    assert all(b["met"] for b in found.report["budgets"])


def test_an_impossible_latency_is_answered_before_any_fit(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"latency_ms: asked at most .*, best reachable .*ms per batch"):
        compress(small_net(), tmp_path / "run", budget={"latency_ms": 1e-4})
    assert not (tmp_path / "run" / "tables").exists()


@pytest.mark.parametrize("cost", ["flops", "params"])
def test_the_least_that_is_said_to_be_reachable_can_be_reached(tmp_path: Path, cost: str) -> None:
    space = {"families": ("sekron", "cp", "tt"), "max_factors": 3, "max_fits": 3, "max_options": 3}
    with pytest.raises(InfeasibleBudgetError) as caught:
        compress(small_net(), tmp_path / "a", budget={cost: 1}, space=space)
    found = compress(small_net(), tmp_path / "b", budget={cost: caught.value.best[cost] * 1.0001}, space=space)
    assert found.report["budgets"][0]["met"]


def test_a_run_goes_on_only_with_the_same_data(tmp_path: Path) -> None:
    model = small_net()
    compress(model, tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"another run \(different: inputs\)"):
        compress(model, tmp_path / "run", calibration=IMAGES + 1, resume=True)
    assert compress(model, tmp_path / "run", resume=True).report["num_trials"] == 1


class Scaled(nn.Module):
    """A network with an argument that no shape shows."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(x).mean((2, 3))) * self.scale
        return logits


def test_a_factory_of_another_network_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'tests\.test_api:Scaled' does not build the network.*its outputs differ"):
        compress(Scaled(2.0), tmp_path / "run", factory="tests.test_api:Scaled")
    with pytest.raises(DataError, match="does not build the network that was given: RuntimeError"):
        compress(small_net(), tmp_path / "run", factory="tests.test_api:Scaled")
    assert not (tmp_path / "run").exists()


class Tied(nn.Module):
    """Layers that can share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(self.conv(x).mean((2, 3))))
        return out


def test_weights_that_were_tied_by_hand_are_no_part_of_what_a_class_builds(tmp_path: Path) -> None:
    model = Tied()
    model.second.weight = model.first.weight
    with pytest.raises(DataError, match=r"does not build the network that was given: .* share other weights"):
        compress(model, tmp_path / "a", factory="tests.test_api:Tied")
    compress(model, tmp_path / "b", budget={"params": "0.9x"})
    with pytest.raises(RunFolderError, match="the artefact names no factory"):
        sekron_search.load(tmp_path / "b")
    loaded = sekron_search.load(tmp_path / "b", model=model)
    assert loaded.get_submodule("second").weight is loaded.get_submodule("first").weight


def test_a_saved_network_that_comes_back_different_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> nn.Module:
        network = sekron_search.load(*args, **options)
        with torch.no_grad():
            next(network.parameters()).mul_(1.001)
        return network

    monkeypatch.setattr("sekron_search.run.load", load)
    with pytest.raises(RunFolderError, match="outputs differ from those of the one that was saved"):
        compress(small_net(), tmp_path / "run")
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize(
    ("train", "says"),
    [
        (TensorDataset(IMAGES[:, :1], torch.zeros(64, dtype=torch.long)), "does not run on inputs of shapes"),
        (TensorDataset(IMAGES[:0]), "train: the data is empty"),
        ([], "train: the data is empty"),
        (IMAGES, "a tensor of inputs goes into a TensorDataset"),
        (5, "expected a dataset, or an iterable of batches, got int"),
        (blobs(64).tensors, r"got a tuple of 2 tensors; inputs and targets go into a TensorDataset\(inputs, targets\)"),
        ([(IMAGES, torch.zeros(64, dtype=torch.long).numpy())], "targets are numpy's, expected tensors"),
        (TensorDataset(IMAGES, torch.full((64,), 9)), "labels run from 9 to 9, the network has 4 classes"),
        (TensorDataset(IMAGES, torch.zeros(64, 8, 8, dtype=torch.long)), r"integer class labels of shape \(32,\)"),
    ],
)
def test_bad_training_data_is_refused_at_once(tmp_path: Path, train: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        compress(small_net(), tmp_path / "run", train=train)
    assert not (tmp_path / "run" / "tables").exists()


@pytest.mark.parametrize(
    "train",
    [
        DataLoader(TensorDataset(IMAGES), batch_size=32),
        TensorDataset(IMAGES, torch.rand(64, 4).softmax(1)),
        TensorDataset(IMAGES, torch.zeros(64, dtype=torch.int32)),
        TensorDataset(IMAGES, torch.zeros(64, dtype=torch.uint16)),
        [IMAGES[:32], (IMAGES[32:], torch.zeros(32, dtype=torch.long))],
    ],
)
def test_training_data_of_many_kinds_is_taken(tmp_path: Path, train: Any) -> None:
    report = compress(small_net(), tmp_path / "run", train=train).report
    assert len(report["curve"]) == 1
    assert report["validation_metric"] is None


def test_a_frozen_network_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing can be fine-tuned"):
        compress(small_net().requires_grad_(False), tmp_path / "a", train=blobs(64))
    assert compress(small_net().requires_grad_(False), tmp_path / "b").report["budgets"][0]["met"]


def test_a_run_goes_on_only_with_the_same_callbacks_and_training(tmp_path: Path) -> None:
    model = small_net()
    compress(model, tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"different: metrics, train\)"):
        compress(model, tmp_path / "run", train=blobs(64), evaluate=lambda network: 1.0, resume=True)


def test_a_compressed_network_can_be_compressed_again(tmp_path: Path) -> None:
    first = compress(small_net(), tmp_path / "a", space={"exclude": ("conv3",)})
    again = compress(first.model, tmp_path / "b", budget={"flops": "0.9x"})
    assert "conv3" in {layer["name"] for layer in again.report["layers"]}
    loaded = sekron_search.load(tmp_path / "b", model=first.model)
    torch.testing.assert_close(loaded(IMAGES[:3]), again.model(IMAGES[:3]))


def test_patterns_that_fit_no_layer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"key 'space\.exclude': 'convv1' fits no layer.*conv1, conv2"):
        compress(small_net(), tmp_path / "run", space={"exclude": ("convv1",)})


def test_unlabelled_data_has_no_accuracy() -> None:
    from sekron_search.data import evaluate

    with pytest.raises(DataError, match="metric 'accuracy' needs data with a target per sample, got NoneType"):
        evaluate(small_net(), TensorDataset(IMAGES), "accuracy", batch_size=8)


def test_tables_are_fitted_once_for_several_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_net()
    compress(model, tmp_path / "a", tables=tmp_path / "tables")
    monkeypatch.setattr("sekron_search.fitting.build_layer_table", lambda *args, **options: pytest.fail("fitted again"))
    found = compress(model, tmp_path / "b", tables=tmp_path / "tables", budget={"params": "0.8x"})
    assert found.report["budgets"][0]["met"]
    assert not (tmp_path / "b" / "tables").exists()
