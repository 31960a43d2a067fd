"""Every example runs, meets its budgets, keeps its metric, and gives a network that opens again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import sekron_search
from examples import own_network, regression, script, segmentation, transformer, two_inputs
from sekron_search.cli import app
from sekron_search.config import Config
from sekron_search.errors import ConfigError
from sekron_search.export import load_weights
from sekron_search.files import read_json
from sekron_search.references import import_reference
from sekron_search.tensor_files import write_tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::UserWarning"
)
EXAMPLES = Path(script.__file__).parent
#: Small enough for a test: few options, few steps.
QUICK: dict[str, Any] = {
    "progress": False,
    "latency": {"rounds": 1},
    "calibration_settings": {"refine_steps": 3, "sequential_steps": 3},
}
SPACE: dict[str, Any] = {"max_options": 8, "rank_levels": 5}
SEARCH = {"trials": 2}
FINETUNE: dict[str, Any] = {"epochs": 1, "candidates": 1, "learning_rate": 1e-3}


def check(result: sekron_search.Result, least: float, loss: float, **sizes: float) -> None:
    """Budgets are met, the network keeps its metric, some layer is replaced, and the report is there."""
    report = result.report
    assert all(budget["met"] for budget in report["budgets"])
    for cost, share in sizes.items():
        assert report["compressed"][cost] <= share * report["original"][cost]
    assert report["original"]["metric"] >= least
    assert report["compressed"]["metric"] >= report["original"]["metric"] - loss
    assert any(layer["structure"].count("*") for layer in report["layers"])
    assert "**Every budget is met.**" in (result.path / "report.md").read_text()


def test_script(tmp_path: Path) -> None:
    found = script.main(epochs=4, out=tmp_path / "run", search=SEARCH, finetune=FINETUNE, space=SPACE, **QUICK)
    check(found, least=0.8, loss=0.1, flops=0.5, params=0.6)
    assert read_json(found.path / "compressed" / "model.json")["factory"]["reference"] == "examples.script:network"


def test_two_inputs(tmp_path: Path) -> None:
    found = two_inputs.main(epochs=6, out=tmp_path / "run", search=SEARCH, finetune=FINETUNE, space=SPACE, **QUICK)
    check(found, least=0.8, loss=0.1, params=0.4)
    halves = torch.randn(3, 1, 8, 4), torch.randn(3, 1, 8, 4)
    assert torch.equal(sekron_search.load(found.path)(*halves), found.model(*halves))
    written = sekron_search.export_network(found.model, halves, tmp_path / "net.onnx", format="onnx")
    assert written.batch_sizes == (3, 6)


def test_segmentation(tmp_path: Path) -> None:
    found = segmentation.main(epochs=5, trials=2, finetune_epochs=1, out=tmp_path / "run", space=SPACE, **QUICK)
    check(found, least=0.6, loss=0.1, flops=0.4)
    images = torch.randn(2, 3, 16, 16)
    ours, again = found.model(images), sekron_search.load(found.path)(images)
    assert ours.keys() == {"mask", "box"}
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    plain = sekron_search.deploy(found.model, images)(images)
    torch.testing.assert_close({**plain}, {**ours}, atol=1e-4, rtol=1e-4)


def test_transformer(tmp_path: Path) -> None:
    space = {**SPACE, "families": ["channel_svd"], "exclude": ["embed", "head"]}
    found = transformer.main(epochs=10, out=tmp_path / "run", search=SEARCH, finetune=FINETUNE, space=space, **QUICK)
    check(found, least=0.5, loss=0.1, params=0.6)
    assert {layer["name"].split(".")[-1] for layer in found.report["layers"]} == {"qkv", "out", "up", "down"}
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(sekron_search.load(found.path)(images), found.model(images))


def test_regression(tmp_path: Path) -> None:
    found = regression.main(epochs=10, trials=2, out=tmp_path / "run", finetune=FINETUNE, space=SPACE, **QUICK)
    check(found, least=-0.7, loss=0.1, params=0.25)  # the mean alone gives -1
    opened = sekron_search.load(found.path, model=nn.Sequential(*(m for m in architecture())))
    x = torch.randn(4, 10)
    assert torch.equal(opened(x), found.model(x))


def architecture() -> list[nn.Module]:
    return [nn.Linear(10, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)]


def quick_config(source: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """An example's configuration, as quick as a test, in another folder."""
    data = yaml.safe_load(source.read_text())
    data["search"], data["space"], data["latency"] = SEARCH, SPACE, {"rounds": 1}
    data["calibration"] = {"samples": 128, "holdout": 64, "batch_size": 64, "refine_steps": 3, "sequential_steps": 3}
    data["finetune"] = {**data.get("finetune", {}), **FINETUNE}
    change(data)
    path = folder / source.name
    path.write_text(yaml.safe_dump(data))
    return path


def test_own_network_from_yaml(tmp_path: Path) -> None:
    own_network.main(tmp_path / "own.pt", epochs=3)
    config = quick_config(EXAMPLES / "own.yaml", tmp_path, lambda data: None)
    done = CliRunner().invoke(app, ["run", str(config), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    report = read_json(tmp_path / "run" / "report.json")
    assert report["metric_name"] == "top2"
    assert report["original"]["metric"] > 0.9
    assert report["compressed"]["metric"] > report["original"]["metric"] - 0.05
    assert all(budget["met"] for budget in report["budgets"])
    saved = Config.load(tmp_path / "run" / "config.yaml")
    assert saved.finetune.loss == "examples.own_network:loss"
    assert sekron_search.load(tmp_path / "run")(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                names.update(EPOCHS=2, TRIALS=2, FINETUNE_EPOCHS=0)
    check(names["result"], least=0.6, loss=0.15, flops=0.5)
    assert names["again"] is not names["result"].model


#: A package of the shape of timm and torchvision: functions that build networks, from modules below it.
STAND_IN = """
from torch import nn

def create_model(model_name, pretrained=False, num_classes=1000, **kwargs):
    assert model_name == "resnet18" and not pretrained
    return resnet18(num_classes=num_classes)

def resnet18(*, weights=None, progress=True, num_classes=1000):
    assert weights is None
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for package, module in (("timm", ""), ("torchvision", "models")):
        home = tmp_path / "site" / package / module
        home.mkdir(parents=True)
        (home.parent / "__init__.py").touch()
        (home / "__init__.py").write_text("from ._networks import create_model, resnet18")
        (home / "_networks.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "site")
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("timm", "torchvision"):
            del sys.modules[name]


def pictures(folder: Path) -> None:
    """Reddish and bluish pictures, a folder each."""
    rng = np.random.default_rng(0)
    for name, colour in (("red", (200, 60, 60)), ("blue", (60, 60, 200))):
        (folder / name).mkdir(parents=True)
        for number in range(160):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (12, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def colour_classifier(model: nn.Module) -> nn.Module:
    """Trained for a moment on the colours that `pictures` draws."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        labels = torch.randint(0, 2, (32,))
        shade = torch.where(labels[:, None].bool(), torch.tensor([1.0, 0, -1.0]), torch.tensor([-1.0, 0, 1.0]))
        loss = nn.functional.cross_entropy(model(shade[:, :, None, None] + torch.randn(32, 3, 12, 12)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def given_network(name: str) -> tuple[dict[str, Any], nn.Module]:
    """The section `model` of an example, and the network that its factory builds."""
    given: dict[str, Any] = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["model"]
    return given, import_reference(given["factory"], "model.factory")(**given["kwargs"])


def with_weights(path: Path, model: nn.Module) -> None:
    state: dict[str, Tensor] = dict(model.state_dict())
    if path.suffix == ".safetensors":
        write_tensors(path, state)
    else:
        torch.save(state, path)


def small_images(data: dict[str, Any]) -> None:
    data["data"]["image_size"] = [12, 12]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_networks_of_the_packages_themselves(tmp_path: Path, name: str) -> None:
    """Where they are installed, which this project does not ask for; what a stand-in cannot show."""
    pytest.importorskip(name)
    pictures(tmp_path / "images")
    given, model = given_network(name)
    with_weights(tmp_path / given["weights"], model)
    config = quick_config(EXAMPLES / f"{name}.yaml", tmp_path, small_images)
    done = CliRunner().invoke(app, ["run", str(config), "--out", str(tmp_path / "run"), "--epochs", "0"])
    assert done.exit_code == 0, done.output
    report = read_json(tmp_path / "run" / "report.json")
    assert report["original"]["params"] == sum(p.numel() for p in model.parameters()) > 1e7
    assert {"layer1.0.conv1", "fc"} <= {layer["name"] for layer in report["layers"]}
    assert report["compressed"]["flops"] <= 0.5 * report["original"]["flops"]
    assert sekron_search.load(tmp_path / "run")(torch.randn(2, 3, 32, 32)).shape == (2, given["kwargs"]["num_classes"])


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_networks_by_name(tmp_path: Path, name: str) -> None:
    pictures(tmp_path / "images")
    given, model = given_network(name)
    weights = tmp_path / given["weights"]
    with_weights(weights, colour_classifier(model))
    config = quick_config(EXAMPLES / f"{name}.yaml", tmp_path, small_images)
    done = CliRunner().invoke(app, ["run", str(config), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    report = read_json(tmp_path / "run" / "report.json")
    assert report["budgets"][0]["met"]
    assert report["original"]["metric"] > 0.95
    assert report["compressed"]["metric"] > 0.9
    opened = sekron_search.load(tmp_path / "run")
    assert opened(torch.randn(3, 3, 12, 12)).shape == (3, given["kwargs"]["num_classes"])
    load_weights(model, weights)  # the file is the original's still


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_missing_package_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "images").mkdir()
    for weights in ("resnet18.pt", "resnet18.safetensors"):
        (tmp_path / weights).touch()
    config = quick_config(EXAMPLES / f"{name}.yaml", tmp_path, lambda data: None)
    factory = Config.load(config).model.factory
    with pytest.raises(ConfigError, match=rf"key 'model.factory': cannot import '{factory}': .*pip install {name}"):
        import_reference(factory, "model.factory")


def test_what_a_module_of_ones_own_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"it is imported there: pip install nothing_of_that_name"):
        import_reference("needy:network", "model.factory")
