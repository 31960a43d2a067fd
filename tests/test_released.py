"""Files that earlier versions, and this one, have written are opened, and mean what they meant."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import sekron_search
from sekron_search import DeviceProfile, load
from sekron_search.cli import app
from sekron_search.config import Config
from sekron_search.files import read_json
from sekron_search.finishing import _selected
from sekron_search.rundir import RunFolder
from sekron_search.search.budget import Budget
from sekron_search.select import select
from sekron_search.tensor_files import read_tensors
from tests.released import described, predicted_ms
from tests.released.__main__ import main

HOME = Path(__file__).parent / "released"
VERSIONS = sorted(path.name for path in HOME.iterdir() if (path / "held.json").exists())


def nearly(value: Any) -> Any:
    """Plain data whose numbers may differ by rounding: sums go in another order on another machine."""
    if isinstance(value, dict):
        return {name: nearly(item) for name, item in value.items()}
    if isinstance(value, list):
        return [nearly(item) for item in value]
    return pytest.approx(value, rel=1e-9) if isinstance(value, float) else value


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, for commands write into run folders."""
    return Path(shutil.copytree(HOME / request.param, tmp_path / request.param))


def test_this_version_is_among_them() -> None:
    assert sekron_search.__version__ in VERSIONS, "run `python -m tests.released`"


def test_what_is_there_is_not_written_over_unasked(tmp_path: Path) -> None:
    (tmp_path / "0.1.0").mkdir()
    (tmp_path / "0.1.0" / "held.json").touch()
    for arguments in ([], ["--agian"]):
        with pytest.raises(SystemExit, match=r"0\.1\.0 is there; --again writes it anew"):
            main(arguments, tmp_path / "0.1.0")
    assert (tmp_path / "0.1.0" / "held.json").exists()


def test_networks_compute_what_they_did(version: Path) -> None:
    kept = read_tensors(version / "network.safetensors")
    for folder in (version / "run", version / "run" / "compressed"):
        network = load(folder)
        assert not network.training
        torch.testing.assert_close(network(kept["input"]), kept["output"], rtol=1e-4, atol=1e-4)


def test_selections_are_opened(version: Path) -> None:
    kept, run = read_tensors(version / "network.safetensors"), RunFolder(version / "run")
    name = read_json(version / "held.json")["selection"]
    torch.testing.assert_close(load(run.selections / name)(kept["input"]), kept["selected"], rtol=1e-4, atol=1e-4)
    found = _selected(run, name)  # as `finish` reads it
    answer = read_json(run.selections / name / "selection.json")
    assert found.pick.budget == answer["budget"]
    chosen = next(t for t in found.trials if t.index == found.pick.trial)
    assert list(chosen.assignment) == answer["chosen"]["assignment"]


def test_structures_mean_what_they_did(version: Path) -> None:
    texts = yaml.safe_load((version / "structures.yaml").read_text())
    assert described(tuple(texts)) == read_json(version / "held.json")["structures"]


def test_finished_runs_answer_as_they_did(version: Path) -> None:
    held, run = read_json(version / "held.json"), RunFolder(version / "run")
    assert read_json(run.report) == held["report"]
    assert Config.load(run.config).budget == {"flops": "0.6x", "latency_ms": "2.0x"}
    for answer in held["selected"]:
        assert select(run, Budget.of(answer["budget"])).to_json() == nearly(answer)


def test_profiles_hold_what_they_did(version: Path) -> None:
    path = version / "run" / "profile.yaml"
    profile = DeviceProfile.load(path)
    assert yaml.safe_load(profile.to_yaml()) == yaml.safe_load(path.read_text())
    assert profile.layers
    device = DeviceProfile.load(version / "device.yaml")
    assert device.operations
    assert predicted_ms(device) == pytest.approx(read_json(version / "held.json")["predicted_ms"], rel=1e-3)


def test_commands_show_them(version: Path) -> None:
    run, trial = str(version / "run"), str(read_json(version / "held.json")["report"]["front"][0]["trial"])
    for arguments in (["list", str(version)], ["show", run], ["show", run, "--trial", trial], ["compare", run, run]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    (version / "run" / "report.md").unlink(missing_ok=True)
    missed = not all(budget["met"] for budget in read_json(version / "run" / "report.json")["budgets"])
    assert CliRunner().invoke(app, ["report", run]).exit_code == (3 if missed else 0)
    assert "0.6x" in (version / "run" / "report.md").read_text()
