"""Write the report of a run folder: Markdown, plots and one page of HTML.

From `report.json` alone, but for records of exports and training curves of candidates, where they lie beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sekron_search.catalog import finished_report
from sekron_search.errors import RunFolderError, SekronError
from sekron_search.files import atomic, read_json, write_text
from sekron_search.report.audit import audit_section
from sekron_search.report.document import Section, escape
from sekron_search.report.latency import latency_section
from sekron_search.report.layers import layers_section
from sekron_search.report.optimality import optimality_section
from sekron_search.report.sections import (
    candidates_section,
    exports_section,
    front_section,
    provenance_section,
    training_section,
)
from sekron_search.report.usage import use_section
from sekron_search.report.verdict import costs_section, headline, summary
from sekron_search.rundir import RunFolder

T = TypeVar("T")


def write_report(folder: RunFolder) -> None:
    """Write `report.md`, `report.html` and the plots.

    Raises:
        RunFolderError: If the run has no report yet, or one of another version.
    """
    # matplotlib takes a second to import, and nothing but this needs it.
    from sekron_search.report.plots import make_plots, save_plot

    report = _read(folder)
    text, page = _texts(folder, report)
    plots = _undamaged(folder, lambda: make_plots(report))
    for name, figure in plots.items():
        for ending in ("png", "svg"):
            with atomic(folder.plots / f"{name}.{ending}") as path:
                save_plot(figure, path, ending)
    write_text(folder.markdown, text)
    write_text(folder.page, page)


def texts(folder: RunFolder) -> tuple[str, str]:
    """The report as Markdown, and as one page of HTML.

    Raises:
        RunFolderError: If the run has no report yet, or one of another version, or a file is damaged.
    """
    return _texts(folder, _read(folder))


def _texts(folder: RunFolder, report: Mapping[str, Any]) -> tuple[str, str]:
    from sekron_search.report.page import make_page  # plotly and jinja2, likewise

    exports = [read_json(path) for path in sorted(folder.exports.glob("*.json"))]
    return _undamaged(folder, lambda: (markdown(report, exports), make_page(report, exports)))


def _read(folder: RunFolder) -> dict[str, Any]:
    """The report, each of its candidates with its training curve as `curve`, where one was kept."""
    report = finished_report(folder)
    _undamaged(folder, lambda: _add_curves(folder, report))
    return report


def _add_curves(folder: RunFolder, report: Mapping[str, Any]) -> None:
    for candidate in report["candidates"]:
        path = folder.candidates / candidate["folder"] / "curve.json"
        if path.exists():
            candidate["curve"] = read_json(path)["epochs"]


def _undamaged(folder: RunFolder, make: Callable[[], T]) -> T:
    """What is made of the report's facts, which may lack some of them, or hold others in their place."""
    try:
        return make()
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, SekronError) as error:
        raise RunFolderError(
            f"{folder.report}, or a file in {folder.exports}, is damaged: {type(error).__name__}: {error}"
        ) from None


def markdown(report: Mapping[str, Any], exports: Sequence[Mapping[str, Any]] = ()) -> str:
    """The report as Markdown.

    Args:
        report: The contents of `report.json`.
        exports: What was exported, as `export_run` records it.
    """
    verdict = "\n".join(f"- {escape(line)}" for line in summary(report))
    sections: list[Section | None] = [
        costs_section(report),
        latency_section(report),
        front_section(report),
        optimality_section(report),
        layers_section(report),
        candidates_section(report),
        training_section(report),
        audit_section(report.get("audit")),
        exports_section(exports),
        provenance_section(report),
        use_section(report),
    ]
    parts = ["# Compression report", f"**{headline(report)}**", verdict]
    return "\n\n".join(parts + [section.markdown() for section in sections if section]) + "\n"
