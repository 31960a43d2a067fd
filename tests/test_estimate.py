"""The estimate of a run before it is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sekron_search.api import job_from_config
from sekron_search.cli import app
from sekron_search.config import Config
from sekron_search.estimate import estimate
from sekron_search.inspection import inspect_model
from sekron_search.model import layer_weight
from sekron_search.progress import Reporter
from sekron_search.scoring import candidates, scores, shortlist
from tests.cases import CONFIG, write_config

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


def test_what_is_counted_is_what_the_run_will_do(tmp_path: Path) -> None:
    job = job_from_config(Config.load(write_config(tmp_path, CONFIG, **{"params: 0.8x": "latency_ms: 0.9x"})))
    state = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    found = estimate(job, Reporter())
    space = job.settings.space
    for plan, info in zip(found.layers, inspect_model(job.model, job.example_inputs).layers, strict=True):
        pool = candidates(info, space)
        weight = layer_weight(job.model, info).double()
        assert plan.name == info.name
        assert plan.structures == len(pool)
        assert plan.options == len(shortlist(pool, scores(pool, weight, space.max_fits), space.max_options))
    stages = {stage.name: stage for stage in found.stages}
    assert list(stages) == [
        *("original", "tables", "latencies", "responses", "trials", "candidates"),
        *("learning rate", "fine-tuning", "report"),
    ]
    assert "8 networks on 128 samples" in stages["trials"].amount
    assert "2 networks, 2 epochs, 32 batches at most" in stages["fine-tuning"].amount
    assert all(stage.seconds > 0 for stage in found.stages)
    assert found.seconds == pytest.approx(sum(stage.seconds for stage in found.stages))
    assert found.memory_bytes > 50e6
    assert found.device_memory_bytes is None
    assert all(tensor.equal(state[name]) for name, tensor in job.model.state_dict().items()), "the network is as it was"


def test_a_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, CONFIG, **{"trials: 8": "trials: 2"})
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").touch()
    options = ["--epochs", "0", "--set", "search.trials=4", "--set", "tables=kept", "--dry-run", "--out", "out"]
    printed = runner.invoke(app, ["run", str(config), *options])
    assert printed.exit_code == 0, printed.output
    assert "These are estimates" in printed.stdout
    assert "4 networks on 128 samples" in printed.stdout
    assert f"less those that {tmp_path / 'kept'} holds already" in " ".join(printed.stdout.split())
    assert "fine-tuning" not in printed.stdout
    more = ["--time-limit", "0.001s", "--set", "audit.candidates=6", "--json"]
    told = json.loads(runner.invoke(app, ["run", str(config), *options, *more]).stdout)
    assert told["estimate"] is True
    assert [layer["name"] for layer in told["layers"]] == ["conv1", "conv2", "conv3", "linear"]
    assert told["disk_bytes"] > 0
    stages = {stage["name"]: stage for stage in told["stages"]}
    assert stages["trials"]["seconds"] == 0.001
    assert stages["audit"]["amount"].startswith("6 networks, 1 epochs, ")
    assert stages["audit"]["seconds"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "kept"}
