"""Commands on run folders: a run without a file, what lists, shows and compares runs, and finishes them."""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner, Result

import sekron_search
from sekron_search.catalog import Searched, list_runs
from sekron_search.cli import app
from sekron_search.comparison import compare
from sekron_search.errors import RunFolderError, SekronError
from sekron_search.files import read_json, write_json
from sekron_search.rundir import RunFolder
from tests.cases import small_net, write_config

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

OPTIONS = [
    *("--model", "tests.test_cli_runs:talkative_net"),
    *("--data", "tests.cases:small_data"),
    *("--budget", "flops=0.6x"),
    *("--epochs", "0"),
    *("--set", "calibration={samples: 64, holdout: 128, batch_size: 32, refine_steps: 3, sequential_steps: 2}"),
    *("--set", "search.trials=5"),
    *("--set", "search.time_limit_s=3600"),
    *("--set", "latency={batch_size: 4, rounds: 3}"),
]

#: Those of them that describe network and data, and how many samples there are.
DESCRIBED = [*OPTIONS[:4], *OPTIONS[8:10]]


def talkative_net() -> nn.Module:
    """A factory that prints, as those of users do."""
    print("building the network")
    return small_net()


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    """The object that a command prints with --json, and nothing beside it."""
    done = invoke(*arguments, "--json")
    assert done.exit_code == code, done.output
    assert all(c.isprintable() or c == "\n" for c in done.output), "progress too is plain where there is no terminal"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, Any]]:
    """A run that options alone describe, and what it said."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    return RunFolder(out), answer("run", *OPTIONS, "--out", out)


@pytest.fixture(scope="module")
def finished(told: tuple[RunFolder, dict[str, Any]]) -> RunFolder:
    return told[0]


def copied(folder: RunFolder, path: Path) -> RunFolder:
    shutil.copytree(folder.path, path)
    return RunFolder(path)


def test_a_run_without_a_file_says_its_verdict_as_one_object(told: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, verdict = told
    report = read_json(folder.report)
    assert verdict["met"] is True
    assert verdict["run"] == str(folder.path)
    assert verdict["budgets"] == report["budgets"]
    assert verdict["compressed"] == report["compressed"]
    assert (report["metric_samples"], report["from_config"]) == (64, True)
    assert "share of 64 samples" in folder.markdown.read_text()
    assert "finish RUN --trial N" in folder.markdown.read_text()
    assert [layer["name"] for layer in verdict["layers"]] == ["conv1", "conv2", "conv3", "linear"]
    assert sekron_search.load(verdict["run"])(torch.randn(2, 3, 8, 8)).shape == (2, 4)
    effective = yaml.safe_load(folder.config.read_text())
    assert effective["budget"] == {"flops": "0.6x"}
    assert effective["search"]["trials"] == 5
    assert effective["search"]["time_limit_s"] == 3600, "a run that is gone on with by its folder alone keeps it"


def test_a_run_is_gone_on_with_by_its_folder_alone(finished: RunFolder) -> None:
    again = invoke("run", "--out", finished.path, "--resume")
    assert again.exit_code == 0, again.output
    assert "flops: asked at most" in again.stdout
    assert answer("report", finished.path)["met"] is True


def test_inspect_answers_in_json_without_a_budget() -> None:
    found = answer("inspect", *DESCRIBED)
    assert found["params"] == sum(p.numel() for p in small_net().parameters())
    assert [layer["name"] for layer in found["layers"]] == ["conv1", "conv2", "conv3", "linear"]
    assert all(layer["structures"] > 0 for layer in found["layers"])


def test_runs_are_listed_with_their_states(finished: RunFolder, tmp_path: Path) -> None:
    copied(finished, tmp_path / "a" / "done")
    missed = copied(finished, tmp_path / "a" / "done" / "finished" / "trial-1")
    report = read_json(missed.report)
    report["budgets"][0]["met"] = False
    write_json(missed.report, report)
    begun = copied(finished, tmp_path / "b")
    for path in (begun.report, begun.network, begun.search):
        path.unlink()
    shutil.rmtree(begun.compressed)
    shutil.rmtree(begun.candidates)
    old = copied(finished, tmp_path / "c")
    write_json(old.manifest, {"format": 1})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "back").symlink_to(tmp_path)  # a circle
    entries = {Path(entry.run).relative_to(tmp_path).as_posix(): entry for entry in list_runs(tmp_path)}
    assert {name: entry.state for name, entry in entries.items()} == {
        "a/done": "finished",
        "a/done/finished/trial-1": "finished",
        "b": "interrupted",
        "c": "unreadable",
    }
    assert entries["a/done"].met is True
    assert entries["a/done"].metric == read_json(finished.report)["compressed"]["metric"]
    assert entries["a/done"].budget == {"flops": "0.6x"}
    assert entries["a/done"].date == read_json(finished.environment)["date"]
    assert entries["a/done/finished/trial-1"].met is False
    assert entries["b"].stage == "searching"
    assert "format 1" in (entries["c"].reason or "")
    with (begun.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a run does that goes on
        assert [entry.state for entry in list_runs(begun.path)] == ["running"]
    printed = invoke("list", tmp_path)
    assert printed.exit_code == 0
    assert "interrupted in searching" in printed.stdout
    assert len(answer("list", tmp_path)["runs"]) == 4
    (tmp_path / "photos" / "back").unlink()
    assert answer("list", tmp_path / "photos") == {"runs": []}
    (tmp_path / "photos" / "big-disk").symlink_to(begun.path)
    (linked,) = list_runs(tmp_path / "photos")
    assert (linked.run, linked.state) == (str(tmp_path / "photos" / "big-disk"), "interrupted")


def test_a_run_that_failed_is_listed_with_its_reason(tmp_path: Path) -> None:
    config = write_config(tmp_path, **{"flops: 0.6x": "flops: 0.0001x"})
    failed = invoke("run", config, "--out", tmp_path / "out")
    assert isinstance(failed.exception, SekronError)
    (entry,) = list_runs(tmp_path)
    assert entry.state == "failed"
    assert entry.reason == str(failed.exception)
    assert "best reachable" in entry.reason


def test_the_front_and_its_trials_are_shown(finished: RunFolder) -> None:
    report = read_json(finished.report)
    front = answer("show", finished.path)["front"]
    assert {row["trial"] for row in front} == {row["trial"] for row in report["front"]}
    for row in front:
        own = next(r for r in report["front"] if r["trial"] == row["trial"])
        assert row["divergence"] == own["objectives"]["divergence"]
        assert row["costs"]["flops"] == pytest.approx(own["objectives"]["flops"])
        shown = answer("show", finished.path, "--trial", str(row["trial"]))
        assert {layer["name"]: layer["structure"] for layer in shown["layers"]} == own["structures"]
    chosen = next(c for c in report["candidates"] if c["chosen"])
    shown = answer("show", finished.path, "--candidate", chosen["folder"])
    assert (shown["trial"], shown["chosen"]) == (chosen["trial"], True)
    assert shown["measured"]["divergence"] == chosen["divergence"]
    text = invoke("show", finished.path).stdout
    assert text.count("\n") == 1 + len(front)
    assert text.count("chosen") == sum(row["chosen"] for row in report["front"])  # which may be without it
    text = invoke("show", finished.path, "--trial", str(chosen["trial"])).stdout
    assert "conv3" in text
    assert "chosen" in text
    with pytest.raises(RunFolderError, match="one of its candidates"):
        Searched.load(finished).candidate("none")
    with pytest.raises(RunFolderError, match="number of one of its trials"):
        Searched.load(finished).trial(99)


def test_a_network_that_two_trials_have_tried_is_the_candidate_of_both(finished: RunFolder, tmp_path: Path) -> None:
    home = copied(finished, tmp_path / "run")
    chosen = next(c for c in read_json(home.report)["candidates"] if c["chosen"])
    searched = read_json(home.search)
    again = {**next(t for t in searched["trials"] if t["index"] == chosen["trial"]), "index": 77}
    write_json(home.search, {**searched, "trials": [*searched["trials"], again]})
    by_name = answer("show", home.path, "--candidate", chosen["folder"])
    assert (by_name["trial"], by_name["chosen"]) == (chosen["trial"], True)
    by_number = answer("show", home.path, "--trial", "77")
    assert (by_number["candidate"], by_number["chosen"]) == (chosen["folder"], True)
    assert by_number["measured"] == by_name["measured"]
    assert by_name["measured"]["divergence"] == chosen["divergence"]
    # What was measured is there before the run has ended.
    home.report.unlink()
    assert answer("show", home.path, "--trial", "77")["measured"] == by_name["measured"]


def test_who_lists_runs_makes_none_fail(tmp_path: Path) -> None:
    """A look at a folder's lock is waited for; a run that holds it is not."""
    home, fingerprint = RunFolder(tmp_path), {"model": 1}
    with (home.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as `list` does
        threading.Timer(0.2, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        with (
            home.claimed(fingerprint, resume=False),
            pytest.raises(RunFolderError, match="another run is using it"),
            RunFolder(home.path).claimed(fingerprint, resume=True),
        ):
            pass


def test_runs_are_compared_and_clocks_of_other_devices_are_not(finished: RunFolder, tmp_path: Path) -> None:
    twin, other = copied(finished, tmp_path / "twin"), copied(finished, tmp_path / "other")
    same = compare([finished, twin])
    assert (same["layers"], same["settings"]) == ({}, {})
    assert same["latencies_comparable"]
    assert same["same_original"]
    report, settings = read_json(other.report), yaml.safe_load(other.config.read_text())
    report["environment"]["processor"] = report["measured_on"] = "abacus"
    report["layers"][0] |= {"structure": "none", "family": "dense"}
    report["layers"][1] |= {"structure": "1x1[a] * 2x2[a]; a=1", "family": "Kronecker"}
    settings["search"]["trials"] = 9
    write_json(other.report, report)
    other.config.write_text(yaml.safe_dump(settings))
    found = answer("compare", finished.path, twin.path, other.path)
    assert found["settings"] == {"search.trials": [5, 5, 9]}
    assert found["layers"]["conv2"][2] == "1x1[a] * 2x2[a]; a=1"
    assert found["device_differs_in"] == ["processor"]
    assert found["latencies_comparable"] is False
    assert found["runs"][0]["compressed"] == read_json(finished.report)["compressed"]
    text = invoke("compare", finished.path, other.path).stdout
    assert "latencies are of different devices or settings, and not to be compared" in text
    assert "abacus" in text
    assert "latency_ms*" in text
    noise = read_json(finished.report)["compressed"]["latency_noise_ms"]
    assert f" ± {noise:.3f} (" in text
    assert "latency_ms*" not in invoke("compare", finished.path, twin.path).stdout
    write_json(twin.report, read_json(twin.report) | {"measured_on": "another abacus"})  # gone on with elsewhere
    assert compare([finished, twin])["device_differs_in"] == ["processor"]


def test_what_is_no_finished_run_is_not_compared(finished: RunFolder, tmp_path: Path) -> None:
    begun, broken = copied(finished, tmp_path / "begun"), copied(finished, tmp_path / "broken")
    begun.report.unlink()
    with pytest.raises(RunFolderError, match="begun: not a finished run"):
        compare([finished, begun])
    with pytest.raises(RunFolderError, match="not a run folder"):
        compare([finished, RunFolder(tmp_path)])
    write_json(broken.report, {"format": 5})
    with pytest.raises(RunFolderError, match=r"broken/report\.json: damaged, or written by another version"):
        compare([finished, broken])


def test_finish_and_select_answer_in_json(finished: RunFolder, tmp_path: Path) -> None:
    """Another trial becomes a run folder that is listed, shown and exported."""
    home = copied(finished, tmp_path / "run")
    row = next(row for row in answer("show", home.path)["front"] if row["candidate"] is None)
    other, code = row["trial"], 0 if row["feasible"] else 3
    verdict = answer("finish", home.path, "--trial", str(other), "--export", "safetensors", code=code)
    target = home.finished / f"trial-{other}"
    assert verdict["run"] == str(target)
    assert verdict["finishes"]["source"] == f"trial {other}"
    assert verdict["met"] is row["feasible"]
    assert (target / "exports" / "compressed" / "model.json").exists()
    exported = answer("export", target, "--format", "safetensors")
    assert exported["file"] == str(target / "exports" / "compressed")
    assert exported["rel_difference"] == 0
    entries = {entry.run: entry for entry in list_runs(tmp_path)}
    assert (entries[str(target)].finishes or "").startswith(f"trial {other} of run ")
    assert f"({verdict['finishes']['source']} of run" in invoke("compare", home.path, target).stdout
    selected = answer("select", home.path, "--budget", "params=0.5x", "--print-only")
    assert selected["network"] is None
    assert selected["chosen"]["costs"]["params"] <= selected["bounds"]["params"]
