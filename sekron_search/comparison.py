"""Finished runs side by side: what was asked, what came out, in what they differ, and what must not be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sekron_search.catalog import finished_report, outcome
from sekron_search.errors import RunFolderError
from sekron_search.files import read_yaml
from sekron_search.pick import Pick
from sekron_search.rundir import RunFolder

#: Settings that say where, not what.
PLACES = ("out", "tables", "finetune.device")

#: Facts of the environment that have to be alike for latencies to be.
DEVICE = ("machine", "processor", "device", "runtime", "runtime_version", "num_threads")


@dataclass(frozen=True)
class Run:
    """A finished run, as far as it is compared.

    Args:
        path: Its folder.
        report: Its report.
        settings: Of its configuration, by dotted key; places left out.
    """

    path: str
    report: Mapping[str, Any]
    settings: Mapping[str, Any]

    @classmethod
    def load(cls, folder: RunFolder) -> Run:
        """Read it.

        Raises:
            RunFolderError: If it has not finished, or is damaged.
        """
        report, pick = finished_report(folder), Pick.of(folder)
        settings = read_yaml(folder.config, f"config {folder.config}")
        if pick is not None:
            settings["budget"] = dict(pick.budget)
        flat = {key: value for key, value in _flat(settings).items() if key not in PLACES}
        return cls(str(folder.path), report, flat)

    def summary(self) -> dict[str, Any]:
        """What came out."""
        return {"run": self.path, **outcome(self.report), "device": self.device}

    @property
    def device(self) -> dict[str, Any]:
        """What its latencies are of."""
        facts, latency = self.report["environment"], self.report["latency"]
        of = None if latency is None else latency["predicted_for"]
        return {
            **{key: facts[key] for key in DEVICE},
            # A run may be begun on one machine and measured on another.
            "processor": self.report.get("measured_on", facts["processor"]),
            "batch_size": self.report["batch_size"],
            "predicted_for": of,
        }

    @property
    def structures(self) -> dict[str, str]:
        """What every layer became; dense ones, and those that the run left alone, are "dense"."""
        return {
            layer["name"]: "dense" if layer["family"] == "dense" else _structure(layer)
            for layer in self.report["layers"]
        }


def compare(folders: Sequence[RunFolder]) -> dict[str, Any]:
    """Finished runs side by side, as plain data.

    Args:
        folders: Two or more.

    Returns:
        `runs`, a summary of each; `layers` and `settings` in which they differ, by name, a value per run;
        `same_original`: whether the original's flops and params are the same; `device_differs_in`: facts of the
        devices that differ; `latencies_comparable`: whether none does.

    Raises:
        RunFolderError: If there are fewer than two, one of them has not finished, is damaged or of another version.
    """
    if len(folders) < 2:
        raise RunFolderError(f"compare: expected at least two run folders, got {len(folders)}")
    runs, summaries, structures = [], [], []
    for folder in folders:
        try:
            run = Run.load(folder)
            summaries.append(run.summary())
            structures.append(run.structures)
            runs.append(run)
        except (KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(
                f"{folder.report}: damaged, or written by another version ({type(error).__name__}: {error})"
            ) from None
    differs = sorted(_different([summary["device"] for summary in summaries]))
    originals = [{cost: summary["original"][cost] for cost in ("flops", "params")} for summary in summaries]
    return {
        "runs": summaries,
        "layers": _different(structures),
        "settings": _different([run.settings for run in runs]),
        "same_original": not _different(originals),
        "device_differs_in": differs,
        "latencies_comparable": not differs,
    }


def _different(mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values differ, with the value of each mapping; None where it lacks the key."""
    names = dict.fromkeys(name for mapping in mappings for name in mapping)
    rows = {name: [mapping.get(name) for mapping in mappings] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def _structure(layer: Mapping[str, Any]) -> str:
    rebuilt = ", rebuilt at load" if layer["execution"] == "dense" else ""
    return f"{layer['structure']}{rebuilt}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
