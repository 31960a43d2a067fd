"""Text forms and YAML files: whatever stands in them is read and written alike, or answered with one clear error."""

from __future__ import annotations

import math
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sekron_search.config import Config
from sekron_search.costs.measure import Latency
from sekron_search.costs.operations import Convolution, Copy, Elementwise, Linear, Operation, Pool
from sekron_search.costs.profile import DeviceProfile
from sekron_search.errors import ConfigError, StructureError
from sekron_search.kron.steps import Schedule
from sekron_search.kron.structure import Structure
from sekron_search.search.space import SearchSpace
from tests.cases import CONFIG, STRUCTURES, STRUCTURES_3D
from tests.fuzz.mutations import Refusal, contents, documents, outcome

ROOT = Path(__file__).parents[2]
FOLDER = Path(tempfile.mkdtemp(prefix="sekron-fuzz-"))

WHOLE_CONFIG = yaml.safe_load(CONFIG) | {
    "space": {"families": ["sekron", "cp"], "include": ["*"], "max_factors": 3, "rank_levels": 4},
    "audit": {"candidates": 6, "budgets": [{"flops": "0.5x"}, {"params": 1000}], "epochs": 1, "seed": 3},
    "metric": "accuracy",
    "seed": 1,
    "device": "cpu",
    "tables": "tables",
    "out": "out",
}
#: Of every kind, some with other extents.
OPERATIONS: list[Operation] = [
    Convolution(2, 6, 8, (9, 7), (3, 1), (2, 1), (1, 1), (1, 0), 2),
    Convolution(1, 4, 6, (5, 5, 5), (2, 2, 2), (2, 2, 2), (1, 1, 1), (0, 0, 0), 1, (1, 1, 1)),
    *(Linear(rows, 64, 10) for rows in range(1, 21)),
    Linear(8, 16, 16, batch=4),
    *(Copy(2, rows, 64, 3) for rows in (1, 8, 64)),
    *(Elementwise(elements, 1) for elements in (64, 1024, 65536)),
    Elementwise(1024, 2),
    Pool(2, 8, 64, 16, 4),
]


def _profile() -> dict[str, Any]:
    """A few entries of a real profile, for what is wrong with one is wrong with all; and a latency model."""
    sample = DeviceProfile.load(ROOT / "runs/sample/profile.yaml")
    latencies = {o: Latency(1e-3 + 1e-6 * (o.flops + o.moved_bytes), 1e-4, 7) for o in OPERATIONS}
    profile = DeviceProfile(sample.provenance, latencies, dict(list(sample.layers.items())[:4]))
    profile.fit(8, 1e-3)
    document: dict[str, Any] = yaml.safe_load(profile.to_yaml())
    return document


PROFILE = _profile()
STRUCTURE_TEXTS = [str(s).encode() for s in (*STRUCTURES.values(), *STRUCTURES_3D.values())]


def _written(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(content)
    return path


def _texts(samples: list[bytes], alphabet: str) -> st.SearchStrategy[str]:
    damaged = st.sampled_from(samples).flatmap(contents).map(lambda b: b.decode("utf-8", "surrogateescape"))
    return damaged | st.text(alphabet, max_size=60) | st.text(max_size=20)


def _yaml(document: Any) -> st.SearchStrategy[bytes]:
    damaged = documents(document).map(lambda d: yaml.safe_dump(d).encode())
    return damaged | contents(yaml.safe_dump(document).encode()) | st.binary(max_size=40)


@settings(max_examples=300)
@given(_texts(STRUCTURE_TEXTS, "0123456789x[]*;=, ab"))
def test_structures(text: str) -> None:
    structure = outcome(lambda: Structure.parse(text), StructureError)
    if isinstance(structure, Refusal):
        return
    assert Structure.parse(str(structure)) == structure
    assert structure.num_params == sum(map(math.prod, structure.factor_shapes))
    assert all(n >= 1 for n in structure.weight_shape)


@settings(max_examples=100)
@given(_texts([b"1*,0", b"0,1,2", b"2*,1*,0"], "0123456789*, "))
def test_schedules(text: str) -> None:
    schedule = outcome(lambda: Schedule.parse(text), StructureError)
    if isinstance(schedule, Refusal):
        return
    assert Schedule.parse(str(schedule)) == schedule


@settings(max_examples=100)
@given(_texts([str(o).encode() for o in OPERATIONS], "0123456789=x, abcdefgmnopq"))
def test_operations(text: str) -> None:
    operation = outcome(lambda: Operation.parse(text), ConfigError)
    if isinstance(operation, Refusal):
        return
    assert Operation.parse(str(operation)) == operation


@settings(max_examples=200)
@given(_yaml(WHOLE_CONFIG))
def test_configs(content: bytes) -> None:
    config = outcome(lambda: Config.load(_written("config.yaml", content)), ConfigError)
    if isinstance(config, Refusal):
        assert "config" in config.message or "search space" in config.message
        return
    assert Config.model_validate(config.model_dump()) == config


@settings(max_examples=100)
@given(_yaml(WHOLE_CONFIG["space"]))
def test_spaces(content: bytes) -> None:
    space = outcome(lambda: SearchSpace.load(_written("space.yaml", content)), ConfigError)
    if isinstance(space, Refusal):
        assert "search space" in space.message
        return
    assert SearchSpace.model_validate(space.model_dump()) == space


#: The latency model is a small part of a profile.
MODELS = documents(PROFILE["model"]).map(lambda model: yaml.safe_dump(PROFILE | {"model": model}).encode())


@settings(max_examples=200)
@given(_yaml(PROFILE) | MODELS)
def test_profiles(content: bytes) -> None:
    profile = outcome(lambda: DeviceProfile.load(_written("profile.yaml", content)), ConfigError)
    if isinstance(profile, Refusal):
        assert "device profile" in profile.message
        return
    again = DeviceProfile.load(_written("again.yaml", profile.to_yaml().encode()))
    assert again.to_yaml() == profile.to_yaml()
    for latency in (*profile.layers.values(), *profile.operations.values()):
        assert 0 < latency.median_ms < math.inf
        assert 0 <= latency.noise_ms < math.inf
    if profile.fitted is not None:
        known = profile.fitted.hyperparameters
        assert all(map(math.isfinite, chain(known.inflation.values(), *known.log_kernel.values())))
        assert all(f"{error.median:.1%}" for error in profile.fitted.errors.values())
