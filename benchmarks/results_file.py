"""Results of benchmarks: JSON with provenance, raw samples and targets."""

from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sekron_search.costs.profile import Provenance
from sekron_search.files import write_text
from sekron_search.runtimes.registry import make_runtime

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Target:
    """What a benchmark has to show; `at_least` says in which direction."""

    name: str
    value: float
    bound: float
    at_least: bool = True

    def to_json(self) -> dict[str, Any]:
        value = float(f"{self.value:.9g}")  # 30 images of 10,000 are 0.3 points, not 0.30000000000000027
        met = value >= self.bound if self.at_least else value <= self.bound
        return {"name": self.name, "value": value, "bound": self.bound, "met": met}


def budget_targets(report: Mapping[str, Any], case: str) -> list[Target]:
    """That the network of a run's report costs no more flops than was allowed."""
    return [Target(f"flops at {case}", item["value"], item["bound"], at_least=False) for item in report["budgets"]]


def earlier_samples(name: str) -> list[dict[str, Any]]:
    """The samples in `benchmarks/results/NAME.json`, for a benchmark that adds to them."""
    path = RESULTS / f"{name}.json"
    return list(samples_of(path)) if path.exists() else []


def samples_of(path: Path) -> Any:
    """What a results file holds besides targets and provenance."""
    return json.loads(path.read_text(encoding="utf-8"))["samples"]


def with_sample(samples: list[dict[str, Any]], sample: dict[str, Any], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Samples and one more, with the commit that made it; it takes the place of one of the same values of some keys."""
    return [s for s in samples if any(s[key] != sample[key] for key in keys)] + [{**sample, "commit": _commit()}]


def write_results(name: str, targets: list[Target], samples: Any, *, command: str) -> Path:
    """Write `benchmarks/results/NAME.json` and print the targets."""
    path = RESULTS / f"{name}.json"
    data = {
        "benchmark": name,
        "command": command,
        "provenance": {
            **dataclasses.asdict(Provenance.here(make_runtime("pytorch-eager"))),
            "commit": _commit(),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
        "targets": [target.to_json() for target in targets],
        "samples": samples,
    }
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
    for target in data["targets"]:
        verdict = "met   " if target["met"] else "MISSED"
        print(f"{verdict} {target['name']}: {target['value']:.6g} (bound {target['bound']:g})")
    print(f"written to {path}")
    return path


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return found.stdout.strip() or "unknown"
