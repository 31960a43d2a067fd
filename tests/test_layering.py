"""Imports point only downward, and each heavy third party has one adapter."""

from __future__ import annotations

import ast
from pathlib import Path

import sekron_search

PACKAGE = Path(sekron_search.__file__).parent

#: From the top down; a module may import from its own row's modules only below the comma-separated order given here.
LAYERS = [
    ["cli"],
    ["api", "demo", "estimate"],
    ["finishing"],
    ["comparison", "run_export", "select", "training_estimate", "worker"],
    ["run"],
    ["report"],
    ["candidates"],
    ["candidate"],
    ["audit"],
    ["proxies"],
    ["prepare"],
    ["table_responses"],
    ["response"],
    ["assembly", "sharing"],
    ["network_tables"],
    ["fit_worker"],
    ["fitting"],
    ["choice", "jobs", "timing"],
    ["job"],
    ["selection"],
    ["variants"],
    ["learning_rate"],
    ["finetune", "sequential", "tables"],
    ["training_step"],
    ["training_form", "training_state", "training_data"],
    ["layer_outputs", "losses", "muon"],
    ["scoring", "export"],
    ["exchange", "repeatable"],
    ["deployment"],
    ["data"],
    ["image_files", "team_task"],
    ["config"],
    ["sections"],
    ["catalog"],
    ["pick"],
    ["rundir"],
    ["search"],
    ["mirrored"],
    ["divergence"],
    ["curvature", "sums"],
    ["calibration"],
    ["costs"],
    ["runtimes"],
    ["inspection"],
    ["model"],
    ["kron"],
    ["tensor_files"],
    ["files", "precision", "progress", "ranking", "references", "team"],
    ["nested"],
    ["errors"],
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}

#: Third parties that few modules alone may import.
ADAPTERS: dict[str, str | tuple[str, ...]] = {
    "fvcore": "costs/traced.py",
    "optuna": ("search/study.py", "search/ledger.py", "search/storage.py", "search/artifacts.py"),
    "optuna_dashboard": "search/dashboard.py",
    "boto3": "search/artifacts.py",
    "botocore": "search/artifacts.py",
    "sqlalchemy": "search/storage.py",
    "grpc": "search/storage.py",
    "matplotlib": "report/plots.py",
    "plotly": "report/page.py",
    "jinja2": "report/page.py",
    "markupsafe": "report/page.py",
    "scipy": ("search/multiple_choice.py", "ranking.py", "costs/design.py", "costs/predict.py"),
    "safetensors": "tensor_files.py",
    "typer": tuple(f"cli/{path.name}" for path in (PACKAGE / "cli").glob("*.py")),
    "threadpoolctl": "costs/predict.py",
    "sklearn": ("data.py", "costs/predict.py"),
    "onnx": "runtimes/onnx.py",
    "onnxruntime": "runtimes/onnx.py",
    "onnxscript": "runtimes/onnx.py",
    "openvino": "runtimes/openvino.py",
}


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def test_imports_point_downward() -> None:
    wrong = []
    for path in modules():
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "sekron_search":
                continue
            assert len(parts) > 1, f"{path}: import from a module, not from the package"
            if parts[1] != own and RANK[parts[1]] <= RANK[own]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_every_module_has_its_layer() -> None:
    assert {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in modules()} == set(RANK)


def test_third_parties_have_one_adapter() -> None:
    for path in modules():
        for name in imports(path):
            own, allowed = path.relative_to(PACKAGE).as_posix(), ADAPTERS.get(name.split(".")[0])
            assert allowed is None or own == allowed or own in tuple(allowed), f"{path} imports {name}"


def test_the_search_knows_no_tensors() -> None:
    for path in (PACKAGE / "search").glob("*.py"):
        assert not any(name.split(".")[0] == "torch" for name in imports(path)), path


def test_no_pickle_is_loaded() -> None:
    for path in modules():
        assert "pickle" not in imports(path), path
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            # What torch.distributed calls objects, it sends as pickles.
            assert "_object" not in called.rsplit(".", 1)[-1], f"{path}: {called}"
            if isinstance(node, ast.Call) and called == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path
