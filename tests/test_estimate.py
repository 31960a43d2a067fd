"""The estimate of a run before it is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor, nn
from typer.testing import CliRunner

from sekron_search.cli import app
from sekron_search.config import Config
from sekron_search.errors import ConfigError, DataError, InfeasibleBudgetError, SekronError
from sekron_search.estimate import Estimate, estimate
from sekron_search.inspection import inspect_model
from sekron_search.jobs import job_from_config
from sekron_search.model import layer_weight
from sekron_search.prepare import fit_tables, table_keys
from sekron_search.progress import Reporter
from sekron_search.rundir import RunFolder
from sekron_search.scoring import candidates, scores, shortlist
from sekron_search.tables import table_files
from sekron_search.training_estimate import Stage
from tests.cases import CONFIG, SmallNet, write_config

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


def test_what_is_counted_is_what_the_run_will_do(tmp_path: Path) -> None:
    job = job_from_config(Config.load(write_config(tmp_path, CONFIG, **{"params: 0.8x": "latency_ms: 0.9x"})))
    state = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    found = estimate(job, Reporter(), RunFolder(tmp_path / "out"))
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
    assert (
        "run folder: out\nbudget: flops at most 0.6x, params at most 0.8x\nruntime: pytorch-eager on cpu, "
        in printed.stdout
    )
    assert "4 networks on 128 samples" in printed.stdout
    assert "already" not in printed.stdout
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


def test_tables_that_are_there_are_not_fitted_again(tmp_path: Path) -> None:
    job, folder = job_from_config(Config.load(write_config(tmp_path))), RunFolder(tmp_path / "out")
    before = tables_of(estimate(job, Reporter(), folder))
    assert "layers, fitted on 64 samples" in before.amount
    assert "already" not in before.amount
    layers = fit_tables(job, folder, Reporter()).layers
    job.model.eval()
    assert tables_of(estimate(job, Reporter(), folder)).seconds == 0
    keys = table_keys(job, layers, job.settings.space.with_granularity(1))
    table_files(folder.tables, keys["conv2"])[0].unlink()
    found = tables_of(estimate(job, Reporter(), folder))
    assert "options of 1 layers, fitted on 64 samples; tables of 3 layers are there already" in found.amount
    assert 0 < found.seconds < before.seconds
    other = job_from_config(Config.load(write_config(tmp_path, **{"refine_steps: 5": "refine_steps: 6"})))
    assert "already" not in tables_of(estimate(other, Reporter(), folder)).amount


def tables_of(found: Estimate) -> Stage:
    return next(stage for stage in found.stages if stage.name == "tables")


class Noisy(SmallNet):
    """A network that draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


def wrong_loss(output: Tensor, target: Tensor) -> float:
    """No loss."""
    return 1.0


@pytest.mark.parametrize(
    ("replaced", "error", "says"),
    [
        ({"flops: 0.6x": "flops: 0.0001x"}, InfeasibleBudgetError, "flops: asked at most .*, best reachable"),
        ({"tests.cases:small_net": f"{__name__}:Noisy"}, DataError, "draws random numbers or keeps state"),
        ({"epochs: 2": f"epochs: 2, loss: '{__name__}:wrong_loss'"}, DataError, "finetune.loss: expected"),
        ({"trials: 8}": "trials: 8}\naudit: {candidates: 6, proxies: ['no.such:one']}"}, ConfigError, "audit.proxies"),
    ],
)
def test_what_a_run_would_refuse_is_refused(
    tmp_path: Path, replaced: dict[str, str], error: type[SekronError], says: str
) -> None:
    job = job_from_config(Config.load(write_config(tmp_path, CONFIG, **replaced)))
    with pytest.raises(error, match=says):
        estimate(job, Reporter(), RunFolder(tmp_path / "out"))


def test_a_folder_that_the_run_could_not_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, runner = write_config(tmp_path), CliRunner()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    job = job_from_config(Config.load(config))
    with RunFolder(tmp_path / "out").claimed(job.fingerprint(), resume=False):
        pass
    options = ["run", str(config), "--dry-run", "--out"]
    monkeypatch.setattr("sekron_search.estimate.estimate", lambda *_: Estimate((), (), 0, None, 0))
    assert "not empty and not a run" in str(runner.invoke(app, [*options, str(tmp_path / "photos")]).exception)
    assert "it holds a run already" in str(runner.invoke(app, [*options, str(tmp_path / "out")]).exception)
    assert "(holds this run" in runner.invoke(app, [*options, str(tmp_path / "out"), "--resume"]).stdout
    changed = [*options, str(tmp_path / "out"), "--resume", "--epochs", "5"]
    assert "another run (different: settings finetune.epochs)" in str(runner.invoke(app, changed).exception)
