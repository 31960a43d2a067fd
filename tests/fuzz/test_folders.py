"""Artefacts and run folders with damaged files: the same result as without damage, or one clear error."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sekron_search
from sekron_search.config import Config
from sekron_search.files import read_json, write_json
from sekron_search.jobs import job_from_config
from sekron_search.progress import Reporter
from sekron_search.report.write import texts
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.search.budget import Budget
from sekron_search.select import select
from tests.cases import CONFIG, write_config
from tests.fuzz.mutations import Refusal, contents, documents, outcome

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

HOME = Path(tempfile.mkdtemp(prefix="sekron-fuzz-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)


@cache
def finished() -> RunFolder:
    """A run of a small network, made once in a process."""
    path = write_config(HOME, CONFIG, **{"epochs: 2": "epochs: 1", "trials: 8": "trials: 4"})
    run(job_from_config(Config.load(path)), RunFolder(HOME / "run"), Reporter(), resume=False)
    return RunFolder(HOME / "run")


@cache
def files() -> list[str]:
    """All files of the run that later commands read, relative to the folder."""
    endings = {".json", ".yaml", ".safetensors", ".journal", ".pt"}
    home = finished().path
    return sorted(str(p.relative_to(home)) for p in home.rglob("*") if p.suffix in endings)


def outputs(network: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8))
    return found


def answers(folder: RunFolder) -> Any:
    """What a finished run says: its verdict and layers, its network, and the answer to another budget."""
    report, found = read_json(folder.report), select(folder, Budget(params="0.6x"))
    facts = {name: report[name] for name in ("budgets", "layers", "front", "compressed")}
    return facts, found.to_json(), outputs(sekron_search.load(folder.path)).tolist()


@cache
def expected() -> Any:
    """The answers without damage."""
    return answers(finished())


@cache
def report_facts() -> dict[str, Any]:
    """What the run's report says."""
    return read_json(finished().report)


def damaged_copy(name: str, damage: bytes) -> RunFolder:
    copy = HOME / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(finished().path, copy)
    (copy / name).write_bytes(damage)
    return RunFolder(copy)


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of the run, and what stands in it instead."""
    name = draw(st.sampled_from(files()))
    content = (finished().path / name).read_bytes()
    return name, draw(contents(content))


@settings(max_examples=60)
@given(damages())
def test_a_damaged_file_changes_no_answer(damage: tuple[str, bytes]) -> None:
    folder = damaged_copy(*damage)
    found = outcome(lambda: answers(folder))
    if isinstance(found, Refusal):
        assert str(folder.path) in found.message
    else:
        assert found == expected()


@settings(max_examples=60)
@given(st.data())
def test_reports_of_strangers(data: st.DataObject) -> None:
    """Whatever a report.json says with a right checksum: text and a page, or one clear error."""
    folder = RunFolder(HOME / "reported")
    try:
        write_json(folder.report, data.draw(documents(report_facts())))
    except (ValueError, TypeError):  # NaN, which JSON has not; keys that are none
        return
    found = outcome(lambda: texts(folder))
    if isinstance(found, Refusal):
        assert str(folder.path) in found.message
        return
    assert all(found)


@settings(max_examples=3)
@given(damages())
def test_a_damaged_file_is_told_or_made_again(damage: tuple[str, bytes]) -> None:
    folder = damaged_copy(*damage)
    for path in (folder.report, folder.compressed / "model.json"):
        path.unlink()
    job = job_from_config(Config.load(HOME / "config.yaml"))
    report = outcome(lambda: run(job, folder, Reporter(), resume=True))
    if isinstance(report, Refusal):
        assert str(folder.path) in report.message
        return
    expected = read_json(finished().report)
    assert [layer["structure"] for layer in report["layers"]] == [layer["structure"] for layer in expected["layers"]]
    torch.testing.assert_close(outputs(sekron_search.load(folder.path)), outputs(sekron_search.load(finished().path)))


@settings(max_examples=60)
@given(st.data())
def test_artefacts_of_strangers(data: st.DataObject) -> None:
    """Whatever a model.json says with a right checksum: a network that runs, or one clear error."""
    copy = HOME / "artefact"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(finished().compressed, copy)
    facts = read_json(copy / "model.json")
    try:
        write_json(copy / "model.json", data.draw(documents(facts)))
    except (ValueError, TypeError):  # NaN, which JSON has not; keys that are none
        return
    network = outcome(lambda: sekron_search.load(copy))
    if isinstance(network, Refusal):
        return
    assert outputs(network).shape == (2, 4)


@settings(max_examples=60)
@given(st.data())
def test_documents_without_a_right_checksum_are_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([n for n in files() if n.endswith(".json")]))
    content = json.loads((finished().path / name).read_text())
    damaged = data.draw(documents(content))
    path = HOME / "document.json"
    path.write_text(json.dumps(damaged), encoding="utf-8", errors="surrogatepass")
    found = outcome(lambda: read_json(path))
    if isinstance(found, Refusal):
        assert str(path) in found.message
        return
    assert {**found, "checksum": content["checksum"]} == content
