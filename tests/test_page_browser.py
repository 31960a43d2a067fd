"""The page in a browser, from disk: pointing, clicking, keys, phones, and that nothing leaves it.

Pictures of it, as wide as a desk's screen and a phone's, lie in build/screenshots afterwards, to be looked at.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium.webdriver import Chrome, Keys

from benchmarks.page.browser import NoBrowserError, browser, complaints, open_page, pointed_at, requests, waited_for
from sekron_search.kron.families import family
from sekron_search.kron.structure import Structure
from sekron_search.report.page import make_page
from tests.pages import attack, full

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

#: Pixels.
SCROLLBAR = 20

SCREENSHOTS = Path(__file__).parent.parent / "build" / "screenshots"

#: Where a candidate of the front is drawn, in pixels of the window.
PLACE = """
const plot = document.getElementById("front-plot");
plot.scrollIntoView({block: "center"});
const name = "front of all objectives";
const number = plot.data.findIndex((trace) => trace.name === name);
const traces = [...plot.querySelectorAll(".scatterlayer .trace")];
const points = traces.find((trace) => trace.querySelectorAll(".points path").length === plot.data[number].x.length
  && trace.querySelector(".points path").style.fill === "rgb(0, 114, 178)");
const box = points.querySelectorAll(".points path")[arguments[0]].getBoundingClientRect();
return [box.x + box.width / 2, box.y + box.height / 2];
"""


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return full(attack)[0]


@pytest.fixture(scope="module")
def path(report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("page") / "report.html"
    found.write_text(make_page(report, full(attack)[1]), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    try:
        with browser() as found:
            yield found
    except NoBrowserError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[1280, 390], scope="module")
def opened(request: pytest.FixtureRequest, chrome: Chrome, path: Path) -> Chrome:
    open_page(chrome, path, request.param)
    waited_for(lambda: chrome.execute_script("return document.querySelectorAll('#front-plot .points path').length"))
    return chrome


def text_of(chrome: Chrome, selector: str) -> str:
    text: str = chrome.execute_script("return document.querySelector(arguments[0])?.textContent || ''", selector)
    return text


def candidates(report: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(report["front"], key=lambda candidate: float(candidate["objectives"]["divergence"]))


def structures(candidate: dict[str, Any]) -> dict[str, str]:
    """As they are shown."""
    rebuilt = candidate["rebuilt"]
    return {n: f"{s}, rebuilt at load" if n in rebuilt else s for n, s in candidate["structures"].items()}


def shown_layers(chrome: Chrome) -> dict[str, str]:
    rows = chrome.execute_script(
        "return [...document.querySelectorAll('#candidate tbody tr')]"
        ".map((row) => [row.querySelector('th').textContent, row.querySelector('code').textContent])"
    )
    return dict(rows)


def test_pointing_at_a_candidate_shows_its_costs_and_clicking_it_its_layers(
    opened: Chrome, report: dict[str, Any]
) -> None:
    chosen = next(candidate for candidate in report["front"] if candidate["chosen"])
    assert text_of(opened, "#candidate h3") == f"Trial {chosen['trial']}, the chosen candidate"
    assert text_of(opened, "#candidate p code") == ""
    assert shown_layers(opened) == structures(chosen)
    number, wanted = len(candidates(report)) - 1, candidates(report)[-1]

    def pointed(*, press: bool) -> str:
        pointed_at(opened, *opened.execute_script(PLACE, number), press=press)
        return text_of(opened, "#candidate h3" if press else "#front-plot .hoverlayer")

    hover = waited_for(lambda: pointed(press=False))
    assert f"trial {wanted['trial']}" in hover
    assert f"flops: {wanted['objectives']['flops']:,.0f}" in hover
    replaced = next(text for text in wanted["structures"].values() if ";" in text)
    assert f"{family(Structure.parse(replaced))}, {replaced.partition('; ')[2]}" in hover
    waited_for(lambda: pointed(press=True) == f"Trial {wanted['trial']}")
    assert shown_layers(opened) == structures(wanted)
    assert text_of(opened, "#candidate p code") == f"sekron-search finish RUN --trial {wanted['trial']}"


def test_every_pair_of_objectives_can_be_drawn(opened: Chrome) -> None:
    choose = (
        "const side = document.getElementById('axis-' + arguments[0]); side.value = arguments[1];"
        "side.dispatchEvent(new Event('change'));"
        "const plot = document.getElementById('front-plot');"
        "return [plot.layout.xaxis.title.text, plot.layout.yaxis.title.text, plot.layout.shapes.length]"
    )
    labels = opened.execute_script("return [...document.getElementById('axis-x').options].map((o) => o.textContent)")
    assert len(labels) == 5
    drawn = set()
    for x, y in itertools.combinations(range(5), 2):
        opened.execute_script(choose, "x", x)
        across, up, budgets = opened.execute_script(choose, "y", y)
        assert budgets == (1 <= x <= 3) + (1 <= y <= 3)
        drawn.add((across, up))
    assert len(drawn) == 10
    # The same on both axes is no pair: the other axis takes the place of the one that was left.
    across, up, _ = opened.execute_script(choose, "x", 3)
    assert across != up
    opened.execute_script(choose, "x", 1)
    opened.execute_script(choose, "y", 0)


def test_the_front_can_be_read_with_keys_alone(opened: Chrome, report: dict[str, Any]) -> None:
    wanted = candidates(report)[0]
    opened.execute_script("document.querySelector('#front details').open = true")
    button = opened.find_element("css selector", "button.pick[data-candidate='0']")
    opened.execute_script("arguments[0].focus()", button)
    button.send_keys(Keys.ENTER)
    waited_for(lambda: text_of(opened, "#candidate h3") == f"Trial {wanted['trial']}")
    assert shown_layers(opened) == structures(wanted)
    assert opened.execute_script("return document.activeElement.id") == "candidate"


def test_nothing_is_wider_than_the_screen_and_all_plots_are_drawn_to_be_printed(opened: Chrome) -> None:
    opened.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    waited_for(
        lambda: opened.execute_script(
            "return [...document.querySelectorAll('.plot')].every((p) => p.querySelector('svg'))"
        )
    )
    assert opened.execute_script("return [...document.querySelectorAll('details')].every((d) => d.open)")
    assert opened.execute_script("return document.documentElement.scrollWidth <= screen.width")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.usefixtures("chrome")  # there is a browser; this test has one of its own, for `opened` is shared
def test_pictures_of_the_page_are_kept(width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, picture = tmp_path / "report.html", SCREENSHOTS / f"report-{width}.png"
    page.write_text(make_page(*full()), encoding="utf-8")
    next_plot = (
        "const plot = [...document.querySelectorAll('.plot')].find((p) => !p.querySelector('svg'));"
        "plot?.scrollIntoView(); return plot === undefined"
    )
    with browser() as own:
        open_page(own, page, width)
        waited_for(lambda: own.execute_script(next_plot))
        own.execute_script("window.scrollTo(0, 0)")
        taken = own.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(base64.b64decode(taken["data"]))
    with capsys.disabled():
        print(f"\n{picture}")
    with Image.open(picture) as image:
        assert width - SCROLLBAR <= image.width <= width
        assert image.height > 2000


def test_names_are_shown_as_they_are_and_never_run(opened: Chrome, path: Path, report: dict[str, Any]) -> None:
    ticks = opened.execute_script(
        "document.querySelectorAll('.plot').forEach((p) => p.scrollIntoView());"
        "return [...document.querySelectorAll('[data-picture=layers] .ytick text')].map((t) => t.textContent)"
    )
    assert any("onerror" in tick or "hacked" in tick for tick in ticks)
    assert opened.execute_script("return window.hacked") is None
    assert opened.execute_script("return document.scripts.length") == 3
    links = "return document.querySelectorAll('main a, img, svg a').length"
    assert opened.execute_script(links) == 0
    assert complaints(opened) == []
    assert set(requests(opened)) == {path.resolve().as_uri()}


def test_the_policy_stops_what_is_not_the_pages_own(opened: Chrome) -> None:
    stopped = opened.execute_async_script(
        "const done = arguments[0], found = [];"
        "document.addEventListener('securitypolicyviolation', (event) => {"
        "  found.push(event.effectiveDirective); if (found.length === 3) done(found.sort()); });"
        "const script = document.createElement('script'); script.textContent = 'window.hacked = 1';"
        "document.body.append(script);"
        "new Image().src = 'http://127.0.0.1:9/x.png';"
        "fetch('http://127.0.0.1:9/').catch(() => 0);"
    )
    assert stopped == ["connect-src", "img-src", "script-src-elem"]
    assert opened.execute_script("return window.hacked") is None
