"""Reports for tests of the page: the sample, and the same with texts that would be markup if they were not escaped."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from sekron_search.files import read_json

SAMPLE = Path(__file__).parent.parent / "runs" / "sample" / "report.json"

#: Each would run if a page took it for what it looks like.
ATTACKS = (
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "\"' onmouseover=window.hacked=1 x='",
    "<b>&lt;b&gt;</b> <a href=javascript:window.hacked=1>%{x}</a>",
    "]]> --> {{ 7 * 7 }} <!--<script>",
)

AUDIT_BUDGETS = ("flops 0.7x", "flops 0.5x")


def sample() -> dict[str, Any]:
    report: dict[str, Any] = read_json(SAMPLE)
    return report


def full(word: Callable[[str], str] = lambda text: text) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A report with every section, and records of exports.

    Args:
        word: Makes a text of a user's out of a harmless one.
    """
    report = sample()
    names = {layer["name"]: word(layer["name"]) for layer in report["layers"]}
    for layer in report["layers"]:
        layer["name"], layer["reason"] = names[layer["name"]], word(layer["reason"])
    report["metric_samples"], report["from_config"] = 400, True
    for candidate in report["front"]:
        candidate["rebuilt"] = [names["block1.conv1"]]
        candidate["structures"] = {names[name]: s for name, s in candidate["structures"].items()}
    for key in ("metric_name", "divergence_name"):
        report[key] = word(report[key])
    for candidate in report["candidates"]:
        candidate["folder"] = word(candidate["folder"])
    report["left_alone"] = [{key: word(key) for key in ("name", "type", "reason")}]
    report["uncounted_operators"] = {word("aten::add"): 3}
    environment = report["environment"]
    for key in ("processor", "machine", "device", "runtime", "python", "date"):
        environment[key] = word(environment[key])
    environment["factory"]["reference"] = word(environment["factory"]["reference"])
    report["latency"]["runtime"] = word(report["latency"]["runtime"])
    errors = {"median": 0.05, "mean": 0.06, "p90": 0.2, "spearman": 0.99, "operations": 900}
    report["latency"]["profile"] = {"options": 512, "operations": 900, "rel_noise": 0.013, "errors": errors}
    report["audit"] = audit(word)
    record = {"file": word("network.onnx"), "num_bytes": 1, "rel_difference": 0.0, "batch_sizes": [1, 2]}
    network = {"name": word("original"), "precision": "int8", "metric": 0.5, "num_bytes": 1}
    network |= {"latency_ms": 1.0, "latency_noise_ms": 0.1}
    record |= {"runtime": word("onnxruntime"), "metric_name": word("accuracy"), "latency_batch_size": 4}
    return report, [{**record, "networks": [network]}]


def audit(word: Callable[[str], str]) -> dict[str, Any]:
    budgets = [word(budget) for budget in AUDIT_BUDGETS]
    proxy = {"tau": 0.8, "low": 0.5, "high": 0.9, "within": dict.fromkeys(budgets, 0.5), "mean_within": 0.5}
    proxies = [{"name": "divergence", "label": word("divergence of the whole network"), "cheap": False, "seconds": 1.0}]
    proxies.append({"name": "curvature", "label": word("output error"), "cheap": True, "seconds": 0.1})
    candidates = [
        {"budget": budget, "scores": {"curvature": 0.1 * k}, "metric": 1 - 0.1 * k}
        for k, budget in enumerate(budgets * 3, start=1)
    ]
    facts = {"epochs": 1, "metric_name": word("accuracy"), "original_metric": 0.9, "train_seconds": 2.0}
    return {**facts, "proxies": [{**p, **proxy} for p in proxies], "candidates": candidates}


def attack(text: str) -> str:
    """A harmless text with an attack that depends on it."""
    return f"{text}{ATTACKS[len(text) % len(ATTACKS)]}"


class Page(HTMLParser):
    """What a browser would make of a page.

    Args:
        text: The page.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[dict[str, str | None]] = []
        self.texts: list[str] = []
        self.code: dict[str, str] = {}
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.attributes.append(dict(attrs))
        self._inside = (dict(attrs).get("id") or f"script {len(self.code)}") if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.code[self._inside] = self.code.get(self._inside, "") + data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        """All that is read, spaces in rows as one."""
        return " ".join(" ".join(self.texts).split())
