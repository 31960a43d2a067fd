"""`compress` on networks, data and callbacks of every odd kind: it works, or says in one error what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sekron_search
from sekron_search.errors import DataError, InfeasibleBudgetError, RunFolderError, SekronError
from sekron_search.inspection import inspect_model
from tests.cases import blobs, small_net

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::UserWarning"
)
IMAGES = blobs(64).tensors[0]


def compress(model: nn.Module, out: Path, **options: Any) -> sekron_search.Result:
    defaults: dict[str, Any] = {
        "example_inputs": IMAGES[:2],
        "budget": {"flops": "0.8x"},
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
        ({"calibration": IMAGES[:1]}, "expected at least two samples, got one"),
        ({"device": "gpu"}, "key 'device': value error, expected a torch device such as 'cpu'"),
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


@pytest.mark.parametrize("outputs", [1, None])
def test_outputs_without_classes_need_mse(tmp_path: Path, outputs: int | None) -> None:
    tail = [nn.Linear(8, 1)] if outputs else [nn.Linear(8, 1), nn.Flatten(0)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *tail)
    with pytest.raises(DataError, match=r"search.divergence is 'kl'.*set search.divergence to 'mse'"):
        compress(model, tmp_path / "a")
    assert compress(model, tmp_path / "b", search={"trials": 1, "divergence": "mse"}).report["budgets"][0]["met"]


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


def test_a_network_with_state_outside_of_its_state_dict_is_noticed(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float = 1.0) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.head = nn.Linear(8, 4)
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.conv(x).mean((2, 3))) * self.scale
            return logits

    # An explicit factory is believed until the saved network is loaded again.
    global _wrong_factory
    _wrong_factory = Scaled
    with pytest.raises(RunFolderError, match="outputs differ from those of the one that was saved"):
        compress(Scaled(2.0), tmp_path / "run", factory="tests.test_api:wrong_factory")


_wrong_factory: Callable[[], nn.Module] = nn.Identity


def wrong_factory() -> nn.Module:
    """A factory that forgets an argument of the network it is named for."""
    return _wrong_factory()


def test_unlabelled_data_has_no_accuracy() -> None:
    from sekron_search.data import evaluate

    with pytest.raises(DataError, match="metric 'accuracy' needs data with a target per sample, got NoneType"):
        evaluate(small_net(), TensorDataset(IMAGES), "accuracy", batch_size=8, device=torch.device("cpu"))


def test_tables_are_fitted_once_for_several_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_net()
    compress(model, tmp_path / "a", tables=tmp_path / "tables")
    monkeypatch.setattr("sekron_search.prepare.build_layer_table", lambda *args, **options: pytest.fail("fitted again"))
    found = compress(model, tmp_path / "b", tables=tmp_path / "tables", budget={"params": "0.8x"})
    assert found.report["budgets"][0]["met"]
    assert not (tmp_path / "b" / "tables").exists()
