"""The page of a report: what it says, what it is made of, and that nothing of the user's becomes markup."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from benchmarks.page.__main__ import report_of
from sekron_search.errors import RunFolderError
from sekron_search.files import write_json
from sekron_search.kron.families import family
from sekron_search.kron.structure import Structure
from sekron_search.report.document import Code, Items, Picture, Section, Table
from sekron_search.report.drawing import TIMES, drawing
from sekron_search.report.figures import make_figures, short_name
from sekron_search.report.latency import latency_section
from sekron_search.report.layers import layer_costs
from sekron_search.report.page import make_page
from sekron_search.report.plots import make_plots
from sekron_search.report.sections import candidates_section, front_section, training_section
from sekron_search.report.usage import use_section
from sekron_search.report.verdict import costs_section, headline, interval, summary
from sekron_search.report.write import markdown, write_report
from sekron_search.rundir import RunFolder
from tests.cases import STRUCTURES, STRUCTURES_3D
from tests.pages import SAMPLE, Page, attack, full, sample

OBJECTIVES = ["divergence", "flops", "params", "latency_ms", "peak_activation_bytes"]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(make_page(*full()))


def data_of(page: Page) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(page.code["data"])
    return data


def texts_of(section: Section) -> list[str]:
    found = []
    for block in section.blocks:
        if isinstance(block, Table):
            found += [column.title for column in block.columns] + [cell for row in block.rows for cell in row]
        elif isinstance(block, Items):
            found += block.texts
        elif isinstance(block, Code):
            found += block.text.splitlines()
        elif not isinstance(block, Picture):
            found.append(block)
    return [" ".join(text.split()) for text in found]


def test_the_parts_are_in_order_and_the_verdict_is_first(page: Page) -> None:
    parts = ["Every budget is met.", "Pareto fronts", "Layers", "How close to the best", "Where time and parameters"]
    parts += ["How it was made", "Fine-tuning", "How far to trust the proxies", "Latency", "Candidates", "Exports"]
    parts += ["Machine and versions", "How to load, export and reproduce it"]
    text = page.text[page.text.index("How to use it") :]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(headings))


def test_the_page_and_the_markdown_say_the_same(page: Page) -> None:
    report, exports = full()
    text = " ".join(markdown(report, exports).split())
    sections = [costs_section(report), latency_section(report), front_section(report), training_section(report)]
    for section in [*sections, candidates_section(report), use_section(report)]:
        assert section is not None
        for said in texts_of(section):
            assert said in page.text
            assert said in text
    for line in summary(report):
        assert line in page.text
        assert line in text
    for layer in report["layers"]:
        assert layer["reason"] in page.text
        assert layer["reason"] in text
        costs = layer_costs(layer)
        assert len(costs.rows) == 5  # time, flops, parameters, activations, error
        for row in costs.rows:
            assert " ".join(" ".join(row).split()) in page.text
            assert " ".join(f"| {layer['name']} | {' | '.join([*row, ''][:5])} |".split()) in text
        if layer["runner_up"] is not None:
            assert layer["runner_up"]["structure"] in text


@pytest.mark.parametrize(
    ("value_ms", "said"),
    [
        (8.0, "8.000 (0.800x): not asked for"),
        (10.5, "10.500 (1.050x, within the noise): not asked for"),
        (12.5, "12.500 (1.250x): not asked for, SLOWER"),
    ],
)
def test_a_latency_that_nothing_was_asked_of_is_told(value_ms: float, said: str) -> None:
    report = sample()
    report["budgets"] = [budget for budget in report["budgets"] if budget["name"] != "latency_ms"]
    report["latency"] = None
    report["optimality"]["gains"] = [g for g in report["optimality"]["gains"] if g["name"] != "latency_ms"]
    report["original"] |= {"latency_ms": 10.0, "latency_noise_ms": 0.5}
    report["compressed"] |= {"latency_ms": value_ms, "latency_noise_ms": 0.5}
    (line,) = (line for line in summary(report) if line.startswith("latency_ms"))
    assert line == f"latency_ms: original 10.000, compressed {said}"
    page, text = Page(make_page(report, [])).text, markdown(report)
    for shown in (page, text):
        assert line in shown
        assert ("With latency_ms: 1x in the budget" in shown) == (value_ms > 12)
    assert ("| SLOWER |" in text) == (value_ms > 12)
    asked = sample()
    asked["compressed"]["latency_ms"] = 1e3
    assert not any("SLOWER" in line for line in summary(asked)), "what was asked for is met or missed"


def latency_verdict(bound_ms: float, value_ms: float, predicted_for: str | None = None) -> str:
    report = sample()
    report["latency"]["predicted_for"] = predicted_for
    report["compressed"] |= {"latency_ms": value_ms, "latency_noise_ms": 0.5}
    report["budgets"][2] |= {"bound": bound_ms, "value": value_ms, "met": value_ms <= bound_ms}
    said = summary(report)[2].rpartition(": ")[2]
    rows = [row for block in costs_section(report).blocks if isinstance(block, Table) for row in block.rows]
    assert any(said in row for row in rows if row[0].startswith("latency"))
    return said


def test_a_latency_that_noise_alone_could_move_over_its_bound_is_said_to_be_so() -> None:
    assert latency_verdict(20.0, 19.4) == "met"
    assert latency_verdict(20.0, 19.6) == "met, within the noise"
    assert latency_verdict(20.0, 20.4) == "MISSED, within the noise"
    assert latency_verdict(20.0, 20.6) == "MISSED"
    assert latency_verdict(20.0, 19.6, "phone") == "met as predicted (± 0.500); measure it on the device"


def test_what_stands_behind_numbers_is_explained_once(page: Page) -> None:
    report, exports = full()
    text = markdown(report, exports)
    for said in (page.text, text):
        assert said.count("± is half the interquartile range") == 1
        assert said.count("is a share of 400 samples") == 1
    low, high = interval(report["compressed"]["metric"], 400)
    assert f"95 % interval {low:.4f} to {high:.4f}; untrained" in text
    assert f"| accuracy, 95 % interval | {low:.4f} to {high:.4f} |" in text
    assert "512 options of layers and 900 operations, as measured; their noise is 1.3%" in text
    assert "cross-validated" not in text  # nothing was predicted
    report["latency"]["predicted_for"] = "phone"
    predicted = markdown(report, exports)
    assert "is 5.0% in the median, and below 20.0% for nine of ten (cross-validated on 900 operations)" in predicted
    assert "± is the standard deviation" in predicted
    plain = markdown(sample() | {"metric_samples": None})  # a report that does not know how many samples there were
    assert "95 %" not in plain.split("## Latency")[0]


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"), [(95, 100, 0.8882, 0.9785), (100, 100, 0.9630, 1.0), (0, 10, 0.0, 0.2775)]
)
def test_intervals_are_wilsons(right: int, samples: int, low: float, high: float) -> None:
    assert interval(right / samples, samples) == pytest.approx((low, high), abs=1e-4)


def test_what_is_said_to_work_does() -> None:
    report = sample()
    text = use_section(report).markdown()
    assert "sekron-search run RUN/config.yaml" in text
    assert "sekron-search finish RUN --trial N " in text
    assert data_of(Page(make_page(report)))["finish"] == "sekron-search finish RUN --trial"
    report["finishes"] = {"run": "abc123", "source": "selection params-0.4x", "trial": 3, "budget": {"params": "0.4x"}}
    text = use_section(report).markdown()
    assert "sekron-search run" not in text
    assert "sekron-search finish SOURCE --selection params-0.4x --out OTHER " in text
    assert "the run that has searched, abc123" in text
    assert data_of(Page(make_page(report)))["finish"] == "sekron-search finish SOURCE --trial"
    report |= {"finishes": None, "from_config": False}
    text = use_section(report).markdown()
    assert not re.search(r"sekron-search (run|finish|export|select RUN --budget \S+ *#)", text)
    assert "sekron-search select RUN --budget flops=0.5x --print-only" in text
    assert data_of(Page(make_page(report)))["finish"] is None


def test_pictures_show_all_that_the_page_draws() -> None:
    report = sample()
    plots = make_plots(report)
    titles = [figure["layout"]["title"]["text"] for figure in make_figures(report)["layers"]]
    shown = [axes.get_xlabel() for axes in plots["layers"].axes]
    assert shown == titles
    assert len(plots["finetuning"].axes) == len(make_figures(report)["finetuning"]) == 3
    pairs = {(axes.get_ylabel(), axes.get_xlabel()) for axes in plots["fronts"].axes if axes.axison}
    large = sum(name.startswith("front_") for name in plots)
    assert len(pairs) + large == 10  # of five objectives
    for axes in plots["fronts"].axes[:7]:
        [steps] = axes.get_lines()
        ends = np.stack([np.asarray(steps.get_xdata()), np.asarray(steps.get_ydata())], 1).tolist()
        dots = np.asarray(axes.collections[0].get_offsets()).tolist()
        assert all(any(x <= a and y <= b for x, y in ends) for a, b in dots)
        assert not any(a <= x and b <= y and (a, b) != (x, y) for x, y in ends for a, b in dots)
    report["learning_rate"] = None
    assert len(make_plots(report)["finetuning"].axes) == 2


def test_curves_of_all_that_was_trained_are_drawn(tmp_path: Path) -> None:
    folder, report = RunFolder(tmp_path), sample()
    shutil.copy(SAMPLE, folder.report)
    other = next(c for c in report["candidates"] if not c["chosen"])
    rows = [{"epoch": 1.0, "loss": 0.5, "metric": 0.25}, {"epoch": 2.0, "loss": 0.4, "metric": 0.75}]
    write_json(folder.candidates / other["folder"] / "curve.json", {"epochs": rows})
    write_report(folder)
    metric, loss, _ = data_of(Page(folder.page.read_text()))["figures"]["finetuning"]
    assert [trace["name"] for trace in metric["data"]] == [f"trial {other['trial']}", "chosen"]
    assert (metric["data"][0]["y"], loss["data"][0]["y"]) == ([0.25, 0.75], [0.5, 0.4])
    assert metric["layout"]["showlegend"]
    assert metric["data"][1]["y"] == [row["metric"] for row in report["curve"]]
    other["curve"] = rows
    drawn = make_plots(report)["finetuning"].axes[0].get_lines()
    assert [line.get_label() for line in drawn] == [f"trial {other['trial']}", "chosen"]
    rows[-1]["divergence"] = 0.125
    last, chosen = report["curve"][-1], next(c for c in report["candidates"] if c["chosen"])
    columns, cells = trained_of(report)
    assert columns == ["epochs trained", "validation, trained", "divergence, trained"]
    assert cells[other["folder"]] == ("2", "0.7500", "0.125")
    assert cells[chosen["folder"]] == (f"{last['epoch']:.0f}", f"{last['metric']:.4f}", "")


def trained_of(report: dict[str, Any]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """The columns of the candidates' table that tell of training, and what they say of each candidate's folder."""
    table = candidates_section(report).blocks[1]
    assert isinstance(table, Table)
    titles = [column.title for column in table.columns]
    first = titles.index("validation") + 1
    return titles[first:], {row[0].split("/")[1]: row[first:] for row in table.rows}


def test_without_a_metric_no_loss_is_called_one() -> None:
    """Rows of curves hold the negative loss then."""
    report = sample()
    report["validation_metric"] = None
    for candidate in report["candidates"]:
        candidate |= {"metric": None, "curve": report["curve"]}
    columns, cells = trained_of(report)
    assert columns == ["epochs trained"]
    assert all(told == (f"{len(report['curve'])}",) for told in cells.values())
    section = training_section(report)
    assert section is not None
    table = section.blocks[-1]
    assert isinstance(table, Table)
    assert [column.title for column in table.columns] == ["epoch", "loss"]
    assert make_figures(report)["finetuning"][0]["layout"]["title"]["text"] == "training loss"
    assert len(make_plots(report)["finetuning"].axes) == 2


def test_where_one_candidate_was_trained_the_table_does_not_repeat_its_curve() -> None:
    assert trained_of(sample())[0] == []


def test_training_that_diverged_is_told() -> None:
    report = sample()
    report["diverged"] = {"epoch": 3, "message": "fine-tuning: the loss became nan"}
    told = "Training diverged in epoch 3; the weights of the epoch before count. fine-tuning: the loss became nan"
    assert told in markdown(report)
    assert told in make_page(report, ())
    assert "the weights as they were fitted count" in markdown({**report, "curve": []})


def test_other_machines_are_told() -> None:
    report = sample()
    here = report["environment"]["processor"]
    moved = {"training": {"trained_on": [here, "abacus"], "batch_norm": "frozen"}, "measured_on": "slide rule"}
    for form in (markdown, lambda given: make_page(given, ())):
        assert not any(text in form(report) for text in ("trained on abacus", "measured on slide rule"))
        assert all(text in form({**report, **moved}) for text in ("trained on abacus", "measured on slide rule"))


def test_a_network_that_stays_as_it_was_fitted_is_told() -> None:
    told = "The network stays as it was fitted"
    assert told in markdown({**sample(), "as_fitted": True})
    assert told not in markdown({**sample(), "as_fitted": False})
    plain = {**sample(), "as_fitted": True, "validation_metric": None}
    for key in ("original", "compressed"):
        plain[key] = {**plain[key], "metric": None}
    found = re.findall(f"{told}.*", markdown(plain))
    assert len(found) == 1
    assert "held-out calibration data" in found[0]
    assert "validation" not in found[0]


def test_the_sample_is_what_this_code_writes() -> None:
    assert (SAMPLE.parent / "report.md").read_text() == markdown(sample())


def test_a_missed_budget_is_said_at_once() -> None:
    report = sample()
    report["budgets"][0]["met"] = False
    page = Page(make_page(report))
    assert headline(report) in page.text
    assert "Not every budget is met." in page.text
    assert "✓" not in headline(report)
    assert {"missed"} < {(a.get("class") or "").split(" ")[-1] for a in page.attributes}
    assert page.text.count("MISSED") == 2  # in the table, and in the list for narrow screens


def test_all_trials_and_objectives_are_there_to_be_drawn(page: Page) -> None:
    report, data = sample(), data_of(page)
    assert sorted(axis["name"] for axis in data["axes"]) == sorted(OBJECTIVES)
    bounds = {axis["name"]: axis["bound"] for axis in data["axes"] if axis["bound"] is not None}
    assert bounds == {budget["name"]: budget["bound"] for budget in report["budgets"]}
    assert len(data["front"]) + len(data["others"]) == len(report["trials"])
    names = [axis["name"] for axis in data["axes"]]
    by_trial = {candidate["trial"]: candidate for candidate in report["front"]}
    for candidate in data["front"]:
        found = by_trial[candidate["trial"]]
        assert candidate["values"] == pytest.approx([found["objectives"][name] for name in names], rel=1e-5)
        shown = {
            layer: options[i]
            for layer, options, i in zip(data["layers"], data["options"], candidate["structures"], strict=True)
        }
        assert shown.pop("block1.conv1") == f"{found['structures'].pop('block1.conv1')}, rebuilt at load"
        assert shown == found["structures"]
    for options, families in zip(data["options"], data["families"], strict=True):
        texts = [text.removesuffix(", rebuilt at load") for text in options]
        assert families == [family(Structure.parse(text)) for text in texts]
    assert [c["trial"] for c in data["front"] if c["chosen"]] == [c["trial"] for c in report["front"] if c["chosen"]]


def test_objectives_that_were_not_measured_are_no_axes() -> None:
    report = sample()
    report["budgets"] = [budget for budget in report["budgets"] if budget["name"] != "latency_ms"]
    report["latency"] = report["optimality"] = report["learning_rate"] = None
    report["curve"], report["environment"]["factory"] = [], None
    for trial in [*report["trials"], *(candidate["objectives"] for candidate in report["front"])]:
        del trial["latency_ms"]
    for layer in report["layers"]:
        for side in (layer["before"], layer["after"], layer["runner_up"] or {}):
            side["latency_ms"] = side["latency_noise_ms"] = None
    page = Page(make_page(report))
    assert [axis["name"] for axis in data_of(page)["axes"]] == ["divergence", "flops", "params", OBJECTIVES[-1]]
    assert "no best to compare with" in page.text
    assert "Fine-tuning" not in page.text
    assert 'load("RUN", model=model)' in page.text
    assert len(make_figures(report)["layers"]) == 3  # parameters, flops, error


def test_layers_are_drawn_and_explained(page: Page) -> None:
    report = sample()
    drawn = [a for a in page.attributes if a.get("class") == "drawing"]
    assert len(drawn) == len(report["layers"])
    for layer, attributes in zip(report["layers"], drawn, strict=True):
        count = Structure.parse(layer["structure"]).num_factors
        assert (attributes["aria-label"] or "").startswith("One dense" if count == 1 else "Factors 1 of")
        assert ("dense" if layer["family"] == "dense" else layer["structure"]) in page.text
        if layer["runner_up"] is not None:
            assert layer["runner_up"]["structure"] in page.text
    opened = [a for a in page.attributes if a.get("class") == "layer" and "open" in a]
    assert len(opened) == sum(layer["family"] != "dense" for layer in report["layers"])


@pytest.mark.parametrize("name", [*STRUCTURES, *(f"3-d {name}" for name in STRUCTURES_3D)])
def test_a_drawing_shows_every_factor_and_who_shares_what(name: str) -> None:
    structure = STRUCTURES_3D[name[4:]] if name.startswith("3-d ") else STRUCTURES[name]
    svg = ET.fromstring(drawing(str(structure)))
    boxes = [{key: float(box.attrib[key]) for key in ("x", "y", "width", "height")} for box in svg.iter("rect")]
    shapes = [text.text for text in svg.iter("text") if text.attrib["class"] == "shape"]
    assert shapes == [TIMES.join(map(str, shape)) for shape in structure.shapes]
    labels = [text.text for text in svg.iter("text") if text.attrib["class"] == "rank"]
    assert sorted(map(str, labels)) == sorted(f"{rank} = {size}" for rank, size in structure.ranks)
    ends = Counter(
        k
        for path in svg.iter("path")
        for x, y in path_points(path)
        for k, box in enumerate(boxes)
        if box["x"] <= x <= box["x"] + box["width"] and box["y"] <= y <= box["y"] + box["height"]
    )
    assert [ends[k] for k in range(structure.num_factors)] == [len(carried) for carried in structure.carries]
    width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
    assert all(0 <= x <= width and 0 <= y <= height for path in svg.iter("path") for x, y in path_points(path))


def path_points(path: ET.Element) -> list[tuple[float, float]]:
    numbers = [float(number) for number in re.findall(r"[\d.]+", path.attrib["d"])]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_lines_of_a_drawing_do_not_run_over_one_another() -> None:
    tangled = "2x3x1x1[a,b,c] * 2x1x3x1[a,c,d] * 2x1x1x3[b,d] * 2x1x1x3[a,b,d]; a=128, b=7, c=3, d=11"
    for text in [tangled, *(str(structure) for structure in STRUCTURES.values())]:
        flat: list[tuple[float, float, float]] = []
        upright: list[tuple[float, float, float]] = []
        for path in ET.fromstring(drawing(text)).iter("path"):
            points = path_points(path)
            for (x0, y0), (x1, y1) in itertools.pairwise(points):
                (flat if y0 == y1 else upright).append((y0, min(x0, x1), max(x0, x1)) if y0 == y1 else (x0, y0, y1))
        for i, (y, left, right) in enumerate(flat):
            assert all(y != other[0] or right < other[1] or other[2] < left for other in flat[i + 1 :])
        assert len({x for x, _, _ in upright}) == len(upright)


def test_nothing_of_a_users_becomes_markup() -> None:
    harmless, hostile = Page(make_page(*full())), Page(make_page(*full(attack)))
    assert hostile.elements == harmless.elements
    assert "window.hacked=1" in hostile.text
    for name in ("<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>", "{{ 7 * 7 }}"):
        assert name in hostile.text  # shown as it is
    assert not set(hostile.code["data"]) & set("<>&")
    allowed = {"class", "id", "href", "data-candidate", "data-picture", "data-number", "role", "aria-label", "scope"}
    quiet = [{k: v for k, v in a.items() if k not in allowed} for a in hostile.attributes]
    assert "hacked" not in json.dumps(quiet)
    assert all((a.get("href") or "#").startswith("#") for a in hostile.attributes)
    text = markdown(*full(attack))
    assert "<script" not in text
    assert "<img" not in text


def test_plots_get_no_markup_from_users() -> None:
    for figures in make_figures(full(attack)[0]).values():
        for figure in figures:
            for text in strings(figure):
                assert "<" not in text.replace("<br>", "")
    assert short_name("block1.conv1") == "block1.conv1"
    assert short_name("a" * 30 + ".conv1") == "…" + "a" * 17 + ".conv1"


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in strings(part)]


def test_the_policy_allows_the_pages_own_scripts_and_no_network(page: Page) -> None:
    policies = [a["content"] or "" for a in page.attributes if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    rules = dict(rule.strip().split(" ", 1) for rule in policies[0].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data: blob:"
    assert not {"connect-src", "font-src", "frame-src"} & set(rules)
    scripts = [code for name, code in page.code.items() if name.startswith("script") and "Plotly" in code]
    hashes = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in scripts]
    assert rules["script-src"].split() == [f"'sha256-{value}'" for value in hashes]
    assert not [a for a in page.attributes if "src" in a or any(name.startswith("on") for name in a)]
    assert not [tag for tag, _ in page.elements if tag in ("link", "iframe", "img", "object", "base", "form")]


def test_tables_have_headers_and_plots_have_words(page: Page) -> None:
    headers = [a for (tag, _), a in zip(page.elements, page.attributes, strict=True) if tag == "th"]
    assert headers
    assert all(a.get("scope") in ("col", "row") for a in headers)
    for a in page.attributes:
        if a.get("class") in ("plot", "front", "drawing", "scroll"):
            assert a.get("aria-label")
            assert a.get("role")


def test_two_thousand_trials_of_fifty_layers_stay_small() -> None:
    report = report_of(2000)
    text = make_page(report)
    assert len(text.encode()) < 6e6
    data = data_of(Page(text))
    assert len(data["front"]) + len(data["others"]) == 2000


def test_a_report_is_written_from_its_json_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match="not a run folder"):
        write_report(folder)
    shutil.copy(SAMPLE, folder.report)
    write_report(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plots", "report.html", "report.json", "report.md"]
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write_report(folder)
    assert {path: path.read_bytes() for path in first} == first
    damaged = sample()
    damaged["layers"][0]["structure"] = "64x1x3x3 * what"
    write_json(folder.report, damaged)
    with pytest.raises(RunFolderError, match=r"report\.json.* is damaged: StructureError: cannot read factor 'what'"):
        write_report(folder)
