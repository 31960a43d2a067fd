"""The run folder: where everything a run makes lies, owned by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sekron_search.errors import RunFolderError
from sekron_search.files import read_json, write_json

FORMAT = 4

#: How long an owner's lock is waited for: `is_claimed` holds one for a moment, as whoever lists runs does.
LOCK_PATIENCE_S = 1.0


class RunFolder:
    """Names of the files of a run, and the check that the folder belongs to it.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.manifest = self.path / "run.json"
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.original = self.path / "original.json"
        self.profile = self.path / "profile.yaml"
        self.layout = self.path / "layout.json"
        self.calibration = self.path / "calibration.json"
        self.tables = self.path / "tables"
        self.study = self.path / "study.journal"
        self.search = self.path / "search.json"
        self.network = self.path / "network.json"
        self.candidates = self.path / "candidates"
        self.learning_rate = self.path / "learning_rate.json"
        self.audit = self.path / "audit.json"
        self.audited = self.path / "audit"
        self.compressed = self.path / "compressed"
        self.exports = self.path / "exports"
        self.selections = self.path / "selections"
        self.finished = self.path / "finished"
        self.pick = self.path / "pick.json"
        self.failure = self.path / "failure.json"
        self.report = self.path / "report.json"
        self.markdown = self.path / "report.md"
        self.page = self.path / "report.html"
        self.plots = self.path / "plots"

    @classmethod
    def new(cls) -> RunFolder:
        """runs/run-1, run-2, ... in the working directory: the first that is free."""
        for number in range(1, 10_000):
            candidate = Path("runs") / f"run-{number}"
            if not candidate.exists():
                return cls(candidate)
        raise RunFolderError("runs/ holds ten thousand runs; clear it, or name a folder")

    @contextlib.contextmanager
    def claimed(self, fingerprint: dict[str, Any], *, resume: bool) -> Iterator[RunFolder]:
        """Own the folder for a run.

        Args:
            fingerprint: What the run is; a folder of another one is refused.
            resume: Whether a folder that holds a run may be gone on with.

        Raises:
            RunFolderError: If another process owns it, it holds another run, another version, or a run that was not
                asked to be resumed, or cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunFolderError(f"run folder {self.path}: cannot be written: {error.strerror}") from None
        with lock:
            self._lock(lock)
            self.check_free(fingerprint, resume=resume)
            if not self.manifest.exists():
                told = {"fingerprint": _digests(fingerprint), "settings": _setting_digests(fingerprint)}
                write_json(self.manifest, {"format": FORMAT, "id": secrets.token_hex(4), **told})
            yield self

    def _lock(self, file: IO[str]) -> None:
        until = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise RunFolderError(
                        f"run folder {self.path}: another run is using it; wait, or choose another"
                    ) from None
                time.sleep(LOCK_PATIENCE_S / 20)
            except OSError as error:
                raise RunFolderError(f"run folder {self.path}: cannot be locked: {error.strerror}") from None

    @contextlib.contextmanager
    def failures_kept(self) -> Iterator[None]:
        """What makes a run fail, and not what interrupts it, is kept until it is gone on with: `list` tells it."""
        self.failure.unlink(missing_ok=True)
        try:
            yield
        except Exception as error:
            with contextlib.suppress(RunFolderError):  # a full disk may be the failure
                write_json(self.failure, {"error": type(error).__name__, "message": str(error)})
            raise

    def is_claimed(self) -> bool:
        """Whether a process owns the folder now."""
        try:
            with (self.path / ".lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def check_free(self, fingerprint: dict[str, Any], *, resume: bool) -> None:
        """Raise the `RunFolderError` of `claimed` if the folder holds what the run may not go on with."""
        if not self.manifest.exists():
            there = self.path.iterdir() if self.path.is_dir() else ()
            if any(p.name != ".lock" and not p.name.startswith(".run.json.") for p in there):
                raise RunFolderError(f"run folder {self.path}: not empty and not a run; choose another folder")
            return
        self.check(fingerprint)
        if not resume:
            raise RunFolderError(f"run folder {self.path}: it holds a run already; give --resume to go on with it")

    def check(self, fingerprint: dict[str, Any]) -> None:
        """Raise a `RunFolderError` if the folder holds another run than this, naming what differs."""
        data = self.read_manifest()
        changed = _different(_digests(fingerprint), data["fingerprint"])
        # Folders of earlier versions do not tell single settings.
        if "settings" in changed and isinstance(data.get("settings"), dict):
            keys = _different(_setting_digests(fingerprint), data["settings"])
            changed[changed.index("settings")] = f"settings {', '.join(keys)}"
        if changed:
            raise RunFolderError(
                f"run folder {self.path}: it holds another run (different: {', '.join(changed)}); "
                "choose another folder, or restore what changed"
            )

    @property
    def identity(self) -> str:
        """What tells the run from all others, wherever its folder is copied to."""
        data = self.read_manifest()
        return str(data.get("id") or _digest(data["fingerprint"]))

    def read_manifest(self) -> dict[str, Any]:
        """What run.json says.

        Raises:
            RunFolderError: If there is none, or it is of another version.
        """
        if not self.manifest.exists():
            raise RunFolderError(f"{self.path}: not a run folder (no run.json)")
        anew = "start a new run, or use the version that wrote it"
        data = read_json(self.manifest, remedy=anew)
        version = data.get("format")
        if version != FORMAT or not isinstance(data.get("fingerprint"), dict):
            raise RunFolderError(
                f"run folder {self.path}: written in format {version!r}, this version reads format {FORMAT}; {anew}"
            )
        return data


def _digests(values: dict[str, Any]) -> dict[str, str]:
    return {name: _digest(value) for name, value in values.items()}


def _setting_digests(fingerprint: dict[str, Any]) -> dict[str, str]:
    """Of every setting, by its key: names of section and key joined by a dot."""
    found: dict[str, str] = {}
    for name, value in fingerprint.get("settings", {}).items():
        parts = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        found |= _digests(parts)
    return found


def _different(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
