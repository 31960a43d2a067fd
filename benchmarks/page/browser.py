"""Chromium without a window, for opening pages from disk."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "about:blank",
)
#: Screens narrower than this are a phone's.
PHONE = 600


class NoBrowserError(Exception):
    """Chromium, or what drives it, is not installed."""


@contextlib.contextmanager
def browser() -> Iterator[Chrome]:
    """A Chromium that keeps its console and its requests.

    Raises:
        NoBrowserError: If there is none; nothing is ever downloaded.
    """
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        raise NoBrowserError("chromium and chromedriver are needed: apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = binary
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        chrome = Chrome(options=options, service=Service(driver))
        try:
            yield chrome
        finally:
            chrome.quit()


def open_page(chrome: Chrome, page: Path, width: int, height: int = 900) -> None:
    """Open a page from disk on a screen of this size in pixels; a phone's is touched. Earlier logs are forgotten."""
    screen = {"width": width, "height": height, "screenWidth": width, "screenHeight": height}
    screen |= {"deviceScaleFactor": 1, "mobile": width < PHONE}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    chrome.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < PHONE})
    chrome.get("about:blank")
    for log in ("browser", "performance"):
        chrome.get_log(log)  # type: ignore[no-untyped-call]
    chrome.get(page.resolve().as_uri())


def requests(chrome: Chrome) -> list[str]:
    """The addresses that the page asked for, itself included."""
    messages = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]  # type: ignore[no-untyped-call]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def complaints(chrome: Chrome) -> list[str]:
    """What the console holds."""
    return [entry["message"] for entry in chrome.get_log("browser")]  # type: ignore[no-untyped-call]


def waited_for(found: Callable[[], Any], timeout_s: float = 60) -> Any:
    """The first value that counts as true.

    Raises:
        TimeoutError: If none comes.
    """
    end = time.monotonic() + timeout_s
    while not (value := found()):
        if time.monotonic() > end:
            raise TimeoutError(f"nothing after {timeout_s:g} s")
        time.sleep(0.05)
    return value


def pointed_at(chrome: Chrome, x: float, y: float, *, press: bool) -> None:
    """Move the mouse to a place in the window, and press it there; a phone is tapped instead."""
    if chrome.execute_script("return matchMedia('(pointer: coarse)').matches"):
        for kind, places in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
            chrome.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})
        return
    moves = [("mouseMoved", x - 3), ("mouseMoved", x)]
    for kind, at in [*moves, *([("mousePressed", x), ("mouseReleased", x)] if press else [])]:
        event = {"type": kind, "x": at, "y": y, "button": "none" if kind == "mouseMoved" else "left"}
        chrome.execute_cdp_cmd("Input.dispatchMouseEvent", {**event, "clickCount": int(kind != "mouseMoved")})
