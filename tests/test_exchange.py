"""Exported files do what the network does, or are not there; a run's exports are measured and reported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import sekron_search
from sekron_search.api import compress
from sekron_search.cli import app
from sekron_search.config import Config
from sekron_search.errors import ConfigError, DataError, RunFolderError
from sekron_search.exchange import FileFormat, compare, export_network
from sekron_search.files import read_json, write_json
from sekron_search.jobs import job_from_config
from sekron_search.kron.conv import KroneckerConv
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from sekron_search.model import REPLACEMENTS
from sekron_search.progress import Reporter
from sekron_search.report.write import write_report
from sekron_search.run import run
from sekron_search.run_export import export_run
from sekron_search.rundir import RunFolder
from sekron_search.runtimes.base import with_memory_format
from tests.cases import STRUCTURES, ImageToImage, SignalNet, VolumeNet, blobs, random_factors, small_net, write_config
from tests.test_deployment import compressed

#: fvcore and torch.jit warn of themselves while a run is made.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

FORMATS: list[FileFormat] = ["onnx", "pt2"]


def opened(path: Path) -> Any:
    """The exported file, by its own tools alone."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


class Floats(nn.Module):
    """Gives float32."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_may_round(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = compressed(small_net()).eval().to(dtype)
    x = torch.randn(4, 3, 8, 8).to(dtype)
    written = export_network(model, x, tmp_path / "network.pt2", format="pt2")
    assert written.rel_difference <= 8 * torch.finfo(dtype).eps
    with torch.no_grad(), pytest.raises(DataError, match="outputs differ from the network's by"):
        compare(lambda x: 1.1 * model(x), (x,), model(x), "pt2", tolerance=8 * torch.finfo(dtype).eps)
    cast = nn.Sequential(model, Floats())
    assert export_network(cast, x, tmp_path / "cast.pt2", format="pt2").rel_difference > 0


def test_volumes_in_channels_last_are_exported(tmp_path: Path) -> None:
    conv = nn.Conv3d(4, 6, 3, padding=1)
    structure = Structure.parse("3x4x3x1x1[a] * 2x1x1x3x3[a]; a=2")
    layer = KroneckerConv.from_conv(conv, structure, schedule=Schedule.parse("0,1*"))
    network = with_memory_format(nn.Sequential(layer).eval(), "channels_last")
    assert export_network(network, torch.randn(2, 4, 8, 8, 8), tmp_path / "a.onnx", format="onnx").num_bytes
    assert not layer.weights[0].is_contiguous(), "the network is not changed"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("build", "shape"),
    [(small_net, (3, 8, 8)), (ImageToImage, (3, 8, 8)), (SignalNet, (3, 16)), (VolumeNet, (1, 4, 6, 6))],
)
def test_any_batch_size_gives_the_networks_outputs(
    build: Any, shape: tuple[int, ...], format: FileFormat, tmp_path: Path
) -> None:
    model = compressed(build()).eval()
    path = tmp_path / f"network.{format}"
    written = export_network(model, torch.randn(1, *shape), path, format=format, more_inputs=[torch.randn(3, *shape)])
    assert written.batch_sizes == (1, 3)
    assert written.num_bytes == path.stat().st_size
    assert written.rel_difference <= 1e-4
    network = opened(path)
    for size in (1, 2, 5):
        x = torch.randn(size, *shape)
        with torch.no_grad():
            expected = model(x)
            assert (network(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("format", FORMATS)
def test_every_family(format: FileFormat, tmp_path: Path) -> None:
    class SideBySide(nn.ModuleList):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x) for layer in self]

    dense = nn.Conv2d(6, 8, 3, stride=(2, 1), padding=1)
    layers = []
    for structure in STRUCTURES.values():
        layer = REPLACEMENTS[nn.Conv2d].like(dense, structure)
        layer.set_factors(random_factors(structure, groups=1))
        layers.append(layer)
    model, x = SideBySide(layers).eval(), torch.randn(2, 6, 9, 8)
    written = export_network(model, x, tmp_path / "network", format=format, more_inputs=[torch.randn(5, 6, 9, 8)])
    assert written.rel_difference <= 1e-4


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_differs_is_not_left(format: FileFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, inputs: Any, **options: Any) -> nn.Module:
        return nn.Sequential(sekron_search.deploy(model, inputs), nn.Linear(4, 4))

    monkeypatch.setattr("sekron_search.exchange.deploy", wrong)
    path = tmp_path / "network"
    path.write_text("what was there before")
    with pytest.raises(DataError, match=f"exported {format} file's outputs differ .* with a batch of 2.*nothing was"):
        export_network(small_net(), torch.randn(2, 3, 8, 8), path, format=format)
    assert path.read_text() == "what was there before"
    assert list(tmp_path.iterdir()) == [path]


class Branches(nn.Module):
    """Does other operations for other inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class FixedBatch(nn.Module):
    """Knows the size of its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 4, 4)


@pytest.mark.parametrize("format", FORMATS)
def test_what_cannot_be_exported_is_refused_in_clear_words(format: FileFormat, tmp_path: Path) -> None:
    path = tmp_path / "network"
    with pytest.raises(DataError, match=r"Branches cannot be exported.*replace branches on tensor values"):
        export_network(Branches(), torch.ones(2, 16), path, format=format)
    with pytest.raises(DataError, match=r"FixedBatch cannot be exported for other batch sizes.*write -1 or x\.shape"):
        export_network(FixedBatch(), torch.ones(2, 16), path, format=format)
    assert list(tmp_path.iterdir()) == []


def test_unknown_formats_and_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ConfigError, match="expected format onnx or pt2, got 'tflite'"):
        export_network(small_net(), x, tmp_path / "n", format="tflite")  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "sekron_search.runtimes.onnx", raising=False)
    monkeypatch.delattr("sekron_search.runtimes.onnx", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"'onnxruntime' is not installed: pip install 'sekron-search\[onnx\]'"):
        export_network(small_net(), x, tmp_path / "n", format="onnx")


def accuracy(network: Any) -> float:
    """On the test data of `small_data`."""
    x, labels = blobs(64, seed=2).tensors
    with torch.no_grad():
        return float((network(x).argmax(1) == labels).float().mean())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    home = tmp_path_factory.mktemp("run")
    folder = RunFolder(home / "out")
    run(job_from_config(Config.load(write_config(home))), folder, Reporter(), resume=False)
    return folder


def test_onnx_and_int8_of_a_run(finished: RunFolder) -> None:
    record = export_run(finished, Reporter(), format="onnx", int8=True)
    networks = {(n["name"], n["precision"]): n for n in record["networks"]}
    assert list(networks) == [(n, p) for p in ("float32", "int8") for n in ("original", "compressed")]
    assert all(network["latency_ms"] > 0 for network in networks.values())
    assert record["batch_sizes"][0] == 4
    assert record["batch_sizes"][1] != 4
    report = read_json(finished.report)
    for name in ("original", "compressed"):
        assert networks[name, "float32"]["metric"] == pytest.approx(report[name]["metric"], abs=0.02)
        assert networks[name, "int8"]["metric"] >= networks[name, "float32"]["metric"] - 0.1
        assert networks[name, "int8"]["num_bytes"] < networks[name, "float32"]["num_bytes"]
    int8 = opened(Path(record["int8_file"]))
    assert accuracy(int8) == pytest.approx(networks["compressed", "int8"]["metric"])
    assert read_json(finished.exports / "compressed.onnx.json") == record
    text = finished.markdown.read_text()
    assert "## Exports" in text
    assert "| original, int8 |" in text


def test_every_finished_candidate_can_be_exported(finished: RunFolder) -> None:
    names = [path.parent.name for path in finished.candidates.glob("*/model.json")]
    assert names
    scores = []
    for name in names:
        record = export_run(finished, Reporter(), format="pt2", candidate=name)
        assert Path(record["file"]) == finished.exports / f"{name}.pt2"
        scores.append(accuracy(opened(Path(record["file"]))))
    assert read_json(finished.report)["compressed"]["metric"] in [pytest.approx(score, abs=0.02) for score in scores]
    with pytest.raises(RunFolderError, match=f"finished candidates .*{names[0]}.*, got '../compressed'"):
        export_run(finished, Reporter(), format="pt2", candidate="../compressed")


def test_safetensors_open_with_load(finished: RunFolder, tmp_path: Path) -> None:
    record = export_run(finished, Reporter(), format="safetensors", out=tmp_path / "network")
    assert record["rel_difference"] == 0
    copy, kept = sekron_search.load(tmp_path / "network"), sekron_search.load(finished.path)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(copy(x), kept(x))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["model.json", "model.safetensors", "network"]


def test_refusals(finished: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8 is for ONNX only, got format pt2"):
        export_run(finished, Reporter(), format="pt2", int8=True)
    with pytest.raises(ConfigError, match="expected format onnx, pt2 or safetensors, got 'tflite'"):
        export_run(finished, Reporter(), format="tflite")  # type: ignore[arg-type]
    with pytest.raises(RunFolderError, match="not a run folder"):
        export_run(RunFolder(tmp_path), Reporter(), format="pt2")


def test_a_run_of_an_object_says_what_to_call(tmp_path: Path) -> None:
    calibration = blobs(128).tensors[0]
    result = compress(
        small_net(),
        calibration[:2],
        budget={"flops": "0.7x"},
        calibration=calibration,
        search={"trials": 2},
        calibration_settings={"refine_steps": 2, "sequential_steps": 0, "batch_size": 64},
        latency={"rounds": 2},
        out=tmp_path / "out",
        progress=False,
    )
    with pytest.raises(RunFolderError, match=r"given as an object.*sekron_search\.export_network"):
        export_run(RunFolder(tmp_path / "out"), Reporter(), format="pt2")
    written = sekron_search.export_network(result.model, calibration[:2], tmp_path / "n.pt2", format="pt2")
    assert written.path.exists()


def test_command(finished: RunFolder) -> None:
    result = CliRunner().invoke(app, ["export", str(finished.path), "--format", "onnx"])
    assert result.exit_code == 0, result.output
    assert "compressed, float32: accuracy" in result.output
    assert "int8" not in result.output


def test_damaged_records_are_named(finished: RunFolder) -> None:
    path = finished.exports / "other.json"
    write_json(path, {})
    try:
        with pytest.raises(RunFolderError, match=r"report.json, or a file in .*exports, is damaged"):
            write_report(finished)
    finally:
        path.unlink()
