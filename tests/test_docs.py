"""The documentation says what is so: its code runs, its tables are computed anew, its links lead somewhere."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.main import get_command

import sekron_search
from sekron_search import catalog, export, rundir
from sekron_search.audit import check_audit
from sekron_search.cli import app
from sekron_search.config import Config
from sekron_search.costs import profile
from sekron_search.errors import ConfigError, StructureError
from sekron_search.files import read_json
from sekron_search.job import Job
from sekron_search.kron.enumeration import skeletons
from sekron_search.kron.families import family
from sekron_search.kron.structure import Structure
from sekron_search.progress import Reporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.runtimes.registry import make_runtime
from sekron_search.search import record
from sekron_search.search.space import SearchSpace

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::UserWarning"
)
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = ["api", "cluster", "command-line", "configuration", "extending", "guide", "results", "structures"]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)


def rows(page: str, heading: str) -> list[list[str]]:
    """The rows of the table whose first line is the heading, cells without backticks."""
    text = (DOCS / f"{page}.md").read_text()
    table = text[text.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table]


def run_doctests(page: str) -> None:
    names: dict[str, Any] = {}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    text = "\n".join(blocks(page, "pycon"))
    runner.run(doctest.DocTestParser().get_doctest(text, names, page, page, 0))
    assert runner.tries > 0
    assert runner.failures == 0


def script(name: str) -> Any:
    """A script of the documentation, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_is_documented_as_it_is() -> None:
    assert script("configuration").page() == (DOCS / "configuration.md").read_text(), "run docs/configuration.py"


def own_config(folder: Path, text: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(text)
    return Config.load(path)


@pytest.mark.parametrize("path", [ROOT / "README.md", *(DOCS / f"{page}.md" for page in PAGES)], ids=lambda p: p.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        target, _, anchor = link.partition("#")
        if target.startswith("http"):
            continue
        found = path.parent / target if target else path
        assert found.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, link


def test_structures_page_runs() -> None:
    torch.manual_seed(0)
    run_doctests("structures")


def test_the_table_of_structures_is_true() -> None:
    table = rows("structures", "| family | text form | parameters |")
    assert len(table) == 13
    for name, text, params in table:
        structure = Structure.parse(text)
        assert str(structure) == text
        assert family(structure) == name
        assert structure.num_params == int(params.replace(",", ""))
        assert structure.weight_shape == (32, 16, 3, 3)


def test_pictures_are_those_of_the_script(tmp_path: Path) -> None:
    module = script("pictures")
    module.main(tmp_path)
    kept = {path.name: path for path in (DOCS / "pictures").glob("*.svg")}
    assert kept.keys() == {path.name for path in tmp_path.glob("*.svg")}
    assert set(re.findall(r"pictures/(\w+\.svg)", (DOCS / "structures.md").read_text())) == kept.keys()
    for name, path in kept.items():
        said = [re.findall(r">([^<>]+)</text>", p.read_text()) for p in (path, tmp_path / name)]
        assert said[0] == said[1]
        assert 0 < path.stat().st_size < 40_000


@pytest.mark.parametrize("page", PAGES)
def test_python_on_the_pages_is_python(page: str) -> None:
    for text in blocks(page, "python"):
        compile(text, page, "exec")


def test_configurations_in_the_guide_are_valid(tmp_path: Path) -> None:
    found = blocks("guide", "yaml")
    assert len(found) > 8
    for name in ("weights.pt", "resnet18.pt", "resnet18.safetensors"):
        (tmp_path / name).touch()
    least = {
        "model": {"factory": "sekron_search.demo:network"},
        "data": {"source": "digits"},
        "budget": {"flops": "0.5x"},
    }
    for text in found:
        own_config(tmp_path, yaml.safe_dump({**least, **yaml.safe_load(text)}))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files of the project on the page about extending, in the working directory."""
    names = []
    for text in blocks("extending", "python"):
        first = text.splitlines()[0]
        names.append(first.removeprefix("# ").removesuffix(".py"))
        (tmp_path / f"{names[-1]}.py").write_text(text)
    assert names == ["my_families", "my_runtimes", "my_proxies"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


QUICK = """
model: {factory: "tests.cases:small_net"}
data: {source: factory, factory: "tests.cases:small_data"}
calibration: {samples: 64, holdout: 64, batch_size: 32, refine_steps: 2, sequential_steps: 2}
search: {trials: 2}
finetune: {epochs: 1, candidates: 1, batch_size: 64, learning_rate: 0.001}
"""


def extended(folder: Path) -> Config:
    """A configuration of everything that the page adds, and little else."""
    data = yaml.safe_load(QUICK)
    for text in blocks("extending", "yaml"):
        data |= yaml.safe_load(text)
    data["space"] |= {"rank_levels": 3, "max_options": 8}
    data["latency"] |= {"rounds": 1, "memory_format": "contiguous"}
    data["budget"] |= {"flops": "0.9x"}
    return own_config(folder, yaml.safe_dump(data))


def test_a_run_with_a_family_a_runtime_and_a_proxy_of_ones_own(project: Path) -> None:
    from sekron_search.jobs import job_from_config

    job = job_from_config(extended(project))
    report = run(job, RunFolder(project / "run"), Reporter(), resume=False)
    assert all(budget["met"] for budget in report["budgets"])
    assert report["latency"]["runtime"] == "pytorch-bfloat16"
    assert report["latency"]["profile"]["options"] >= sum(layer["num_options"] for layer in report["layers"])
    assert report["latency"]["profile"]["rel_noise"] >= 0
    names = [proxy["name"] for proxy in report["audit"]["proxies"]]
    assert names[-1] == "my_proxies:worst_layer"
    for row in read_json(project / "run" / "audit.json")["candidates"]:
        assert row["scores"]["my_proxies:worst_layer"] <= row["scores"]["output_error"] ** 0.5 + 1e-9
    assert "| my_proxies:worst_layer |" in (project / "run" / "report.md").read_text()
    offered = {
        o["structure"] for t in read_json(project / "run" / "network.json")["network"]["tables"] for o in t["options"]
    }
    assert any(text.count("*") == 3 for text in offered), offered


@pytest.mark.usefixtures("project")
def test_extending_page_runs() -> None:
    run_doctests("extending")


def test_a_runtime_of_ones_own_computes_what_pytorch_does(project: Path) -> None:
    runtime = make_runtime("my_runtimes:Bfloat16")
    network, x = torch.nn.Linear(4, 3), torch.randn(2, 4)
    [found] = runtime.compile(network, (x,)).outputs()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), network(x), atol=0.05, rtol=0.05)
    with pytest.raises(
        ConfigError, match=r"latency.runtime': expected a subclass of Runtime, got 'my_runtimes:halved'"
    ):
        make_runtime("my_runtimes:halved")


def test_what_is_no_family_is_refused(project: Path) -> None:
    (project / "wrong.py").write_text(
        "from sekron_search.kron.enumeration import Skeleton\n"
        "def small(shape, most):\n    yield Skeleton(((2, 1, 1, 1), (1, 2, 1, 1)), (('a',), ('a',)))\n"
        "def texts(shape, most):\n    yield '4x1x1x1[a] * 1x4x1x1[a]; a=1'\n"
    )
    with pytest.raises(StructureError, match=r"of the weight shape \(4, 4, 1, 1\), got .* are \(2, 2, 1, 1\)"):
        list(skeletons("wrong:small", (4, 4, 1, 1), 2, 1))
    with pytest.raises(StructureError, match="expected it to give Skeletons, got str"):
        list(skeletons("wrong:texts", (4, 4, 1, 1), 2, 1))
    with pytest.raises(ConfigError, match=r"key 'space.families': cannot import 'wrong:lost'"):
        list(skeletons("wrong:lost", (4, 4, 1, 1), 2, 1))
    with pytest.raises(ValueError, match=r"expected sekron, .* or a function of your own"):
        SearchSpace(families=("lost",))
    sys.modules.pop("wrong", None)


def test_a_proxy_that_is_not_there_is_refused_before_any_work(project: Path) -> None:
    from sekron_search.jobs import job_from_config

    config = extended(project)
    lost = config.audit.model_copy(update={"proxies": ("my_proxies:lost",)})
    job: Job = job_from_config(config.model_copy(update={"audit": lost}))
    with pytest.raises(ConfigError, match=r"key 'audit.proxies': cannot import 'my_proxies:lost'"):
        check_audit(job)


def test_public_names_are_those_of_the_page() -> None:
    assert [name for name, _ in rows("api", "| name | what it is |")] == sekron_search.__all__
    assert sorted(sekron_search.__all__) == sekron_search.__all__


def test_formats_are_those_of_the_page() -> None:
    formats = {row[0]: row[1] for row in rows("api", "| file | format | for |")}
    assert formats["compressed/model.json"] == str(export.FORMAT)
    assert formats["report.json"] == str(catalog.REPORT_FORMAT)
    assert formats["a device profile (YAML)"] == str(profile.FORMAT)
    assert formats["network.json"] == str(record.FORMAT)
    assert formats["run.json"] == str(rundir.FORMAT)


def test_commands_of_the_page_are_there() -> None:
    said = (DOCS / "api.md").read_text().split("## The command line")[1].split("## Files")[0]
    commands: Any = get_command(app)
    named = set(re.findall(r"`(\w+)`", said.split("of `sekron-search`")[0]))
    assert named == set(commands.commands)


@pytest.mark.parametrize("name", sekron_search.__all__)
def test_public_names_are_documented(name: str) -> None:
    found = getattr(sekron_search, name)
    documented = [(name, found)]
    if inspect.isclass(found):
        own = [(key, getattr(found, key)) for key in vars(found) if not key.startswith("_") and key != "model_config"]
        documented += [(f"{name}.{key}", member) for key, member in own if inspect.isroutine(member)]
    for what, member in documented:
        text = inspect.getdoc(member)
        assert text, what
    try:
        parameters = set(inspect.signature(found).parameters) - {"args", "kwargs"}
        parameters = {name for name in parameters if not name.startswith("_")}
    except ValueError:  # an exception without a constructor of its own
        return
    if parameters:
        text = inspect.getdoc(found) or ""
        assert "Args:" in text
        for parameter in parameters:
            assert re.search(rf"^ +\**({parameter}|[\w, ]*\b{parameter}\b[\w, ]*):", text, re.MULTILINE), parameter


def test_the_reference_lists_every_public_name(tmp_path: Path) -> None:
    module = script("reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        module.main(tmp_path)
    page = (tmp_path / "sekron_search.html").read_text()
    for name in sekron_search.__all__:
        assert f'id="{name}"' in page
    assert (tmp_path / "sekron_search" / "runtimes" / "base.html").exists()
