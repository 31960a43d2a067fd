"""What is made of runs' results: targets over seeds, and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from benchmarks.accuracy import plot as accuracy_plot
from benchmarks.accuracy.__main__ import targets_of
from benchmarks.results_file import Target
from benchmarks.rivals import plot as rivals_plot
from sekron_search.files import write_json


def sample(network: str, budget: str, seed: int, lost: float, **changes: Any) -> dict[str, Any]:
    return {
        "network": network,
        "budget": budget,
        "seed": seed,
        "epochs": 10,
        "mirrored_teacher": True,
        "lost": {"test": lost, "validation": 3 * lost},
        "lost_without_training": 5.0,
        "budgets": [{"name": "flops", "value": 49.0, "bound": 50.0}],
        **changes,
    }


def named(targets: list[Target]) -> dict[str, Target]:
    return {target.name: target for target in targets}


def test_what_is_lost_is_the_mean_of_seeds_that_learned_alike() -> None:
    found = named(
        targets_of(
            [
                sample("resnet20", "0.5x", 0, 9.0, mirrored_teacher=False),
                sample("resnet20", "0.5x", 1, 9.0, epochs=3),
                sample("resnet20", "0.5x", 1, 0.1),
                sample("resnet20", "0.5x", 2, 0.5),
                sample("resnet20", "0.7x", 2, 9.0),
                sample("edsr", "0.25x", 0, 0.1, budgets=[{"name": "flops", "value": 26.0, "bound": 25.0}]),
            ]
        )
    )
    lost = found["resnet20 at 0.5x flops, CIFAR-10: points of top-1 lost after 10 epochs, mean of 2 seeds"]
    assert lost.value == pytest.approx(0.3)
    assert lost.bound == 0.2
    assert lost.to_json()["met"] is False
    # Of super-resolution Set14, on which networks were chosen, counts too.
    for name, value in {"Set5": 0.1, "Set14": 0.3}.items():
        lost = found[f"edsr at 0.25x flops, {name}: dB lost after 10 epochs, mean of 1 seeds"]
        assert lost.value == pytest.approx(value)
        assert lost.bound == 0.15
    assert found["flops at resnet20 at 0.5x flops, seed 1"].to_json()["met"] is True
    assert found["flops at edsr at 0.25x flops, seed 0"].to_json()["met"] is False
    assert len(found) == 6


def test_losses_are_drawn_against_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: dict[str, tuple[list[float], list[float]]] = {}
    draw = Axes.plot

    def noted(self: Axes, x: Any, y: Any, *args: Any, **options: Any) -> Any:
        if "label" in options:
            lines[options["label"]] = (list(x), list(y))
        return draw(self, x, y, *args, **options)

    monkeypatch.setattr(Axes, "plot", noted)
    samples = [sample("resnet20", "0.5x", seed, float(seed), epochs=epochs) for seed in (0, 1) for epochs in (3, 10)]
    write_json(tmp_path / "accuracy.json", {"samples": [*samples, sample("edsr", "0.5x", 0, 0.05)]})
    accuracy_plot.plot(tmp_path / "accuracy.json")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert lines == {"resnet20, 0.5x flops": ([0, 3, 10], [5, 0.5, 0.5]), "edsr, 0.5x flops": ([0, 10], [5, 0.05])}


def test_what_is_far_below_the_rivals_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    write = Axes.text

    def noted(self: Axes, x: float, y: float, text: str, **options: Any) -> Any:
        texts.append(text)
        return write(self, x, y, text, **options)

    def entry(method: str, budget: str, test: float, seed: int = 0, processor: str = "A") -> dict[str, Any]:
        share = float(budget.removesuffix("x"))
        same = {"network": "resnet20", "epochs": 3, "mirrored_teacher": False, "processor": processor, "seed": seed}
        return {**same, "budget": budget, "method": method, "test": test, "flops_ratio": share, "latency_ratio": share}

    monkeypatch.setattr(Axes, "text", noted)
    samples = [entry("ours", b, t) for b, t in {"0.5x": 0.88, "0.25x": 0.87}.items()]
    samples += [entry("uniform CP", b, t) for b, t in {"0.5x": 0.88, "0.25x": 0.86}.items()]
    samples += [entry("GKPD", "0.25x", t, seed, "B") for seed, t in enumerate((0.5, 0.6))]
    samples += [entry("uniform CP", "0.15x", 0.0) | {"failed": "no network is so small"}]
    write_json(tmp_path / "rivals.json", {"samples": samples})
    rivals_plot.plot(tmp_path / "rivals.json")
    assert (tmp_path / "rivals.png").read_bytes().startswith(b"\x89PNG")
    assert texts == ["not shown: 2 of 6 samples, of another processor", "below: GKPD 55.00"]
