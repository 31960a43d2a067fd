"""How large the page of a report is, and how long a browser takes to open it, with more and more trials.

    python -m benchmarks.page [--repeats 5]

Reports are the sample's, with as many trials, and 50 layers: every eighth trial is on the front. Chromium opens each
page from disk, the first time in a new profile, then again. Seconds are from asking for the page to its fronts being
drawn, and of its main thread alone, which other load on the machine stretches less.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from selenium.webdriver import Chrome

from benchmarks.page.browser import browser, open_page, waited_for
from benchmarks.results_file import Target, write_results
from sekron_search.files import read_json
from sekron_search.report.page import make_page

SAMPLE = Path(__file__).parents[2] / "runs" / "sample" / "report.json"
TRIALS = (100, 500, 2000)
LAYERS = 50
#: One trial in so many is on the front.
ON_FRONT = 8


def report_of(num_trials: int, num_layers: int = LAYERS, seed: int = 0) -> dict[str, Any]:
    """The sample's report with this many trials and layers."""
    report: dict[str, Any] = read_json(SAMPLE)
    rng, old = random.Random(seed), report["layers"]
    report["layers"] = [{**old[i % len(old)], "name": f"stage{i // 9}.block{i % 9}.conv"} for i in range(num_layers)]
    names = [layer["name"] for layer in report["layers"]]
    structures = sorted({s for c in report["front"] for s in c["structures"].values()})
    sources, front = rng.choices(report["trials"], k=num_trials), []
    report["trials"] = [
        {**trial, "divergence": trial["divergence"] * rng.uniform(1, 2), "flops": trial["flops"] * rng.uniform(1, 1.2)}
        for trial in sources
    ]
    for index, trial in list(enumerate(report["trials"]))[::ON_FRONT]:
        objectives = {name: trial[name] for name in report["front"][0]["objectives"]}
        chosen = {name: rng.choice(structures) for name in names}
        facts = {"trial": index, "objectives": objectives, "structures": chosen, "chosen": index == 0}
        front.append({**facts, "feasible": trial["feasible"], "source": trial["source"]})
    return {**report, "front": front, "num_trials": num_trials}


def opened(chrome: Chrome, page: Path, width: int) -> dict[str, float]:
    """Seconds until the page is loaded, its fronts drawn, and those of them that the main thread was busy."""
    chrome.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    open_page(chrome, page, width)
    waited_for(lambda: chrome.execute_script("return document.querySelectorAll('#front-plot .points path').length"))
    seconds = chrome.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")
    metrics = chrome.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    chrome.execute_cdp_cmd("Performance.disable", {})
    return {"seconds": seconds, "busy_seconds": next(m["value"] for m in metrics if m["name"] == "TaskDuration")}


def measured(num_trials: int, width: int, repeats: int) -> dict[str, Any]:
    """Size and times of a page; a new browser for every repeat."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(make_page(report_of(num_trials)), encoding="utf-8")
        times = []
        for _ in range(repeats):
            with browser() as chrome:
                first, second = (opened(chrome, page, width) for _ in range(2))
            times.append({"first": first, "second": second})
        row = {"trials": num_trials, "width": width, "bytes": page.stat().st_size, "times": times}
    print(row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", help="not used; what all benchmarks are called with")
    repeats = parser.parse_args().repeats
    rows = [measured(trials, width, repeats) for trials in TRIALS for width in (1280, 390)]
    large = [row for row in rows if row["trials"] == max(TRIALS)]

    def median(key: str) -> float:
        return max(float(np.median([t["first"][key] for t in row["times"]])) for row in large)

    targets = [
        Target("megabytes", max(row["bytes"] for row in large) / 1e6, 6.0, at_least=False),
        Target("first opening, s", median("seconds"), 2.0, at_least=False),
        Target("first opening, main thread busy, s", median("busy_seconds"), 2.0, at_least=False),
    ]
    write_results("page", targets, rows, command=f"python -m benchmarks.page --repeats {repeats}")


if __name__ == "__main__":
    main()
