"""Files that go with a study, for workers that do not share a disk: a folder, or a bucket of an S3-compatible store."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from optuna.artifacts import Boto3ArtifactStore, FileSystemArtifactStore, download_artifact, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound

from sekron_search.errors import StorageError
from sekron_search.files import atomic
from sekron_search.search.ledger import Ledger


class _ArtifactStore(Protocol):
    """What Optuna wants of a store."""

    def open_reader(self, artifact_id: str) -> BinaryIO: ...
    def write(self, artifact_id: str, content_body: BinaryIO) -> None: ...
    def remove(self, artifact_id: str) -> None: ...


@dataclass(frozen=True)
class Artifacts:
    """An open artifact store.

    Args:
        store: Optuna's.
        where: The folder or URL.
        failures: What it raises when it cannot be reached.
        release: Gives its connections back.
    """

    store: _ArtifactStore
    where: str
    failures: tuple[type[Exception], ...] = (OSError,)
    release: Callable[[], None] = lambda: None

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> Artifacts:
        """Open a store.

        Args:
            url: A folder, made where it does not exist, or s3://BUCKET/PREFIX. Credentials, and the endpoint of a
                store that is not Amazon's, are boto3's: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL_S3.

        Raises:
            StorageError: If it cannot be opened.
        """
        text = os.fspath(url)
        if text.startswith("s3://"):
            return _bucket(text)
        if "://" in text:
            raise StorageError(f"artifacts {text}: expected a folder or s3://BUCKET/PREFIX")
        folder = Path(text).expanduser().resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"artifacts {folder}: cannot be written: {error.strerror}") from None
        return cls(FileSystemArtifactStore(folder), str(folder))

    def upload(self, ledger: Ledger, files: Mapping[str, Path]) -> None:
        """Give a study files, by name; those that it has already, of the same content, are left.

        Raises:
            StorageError: If the store cannot be reached.
        """
        known = ledger.files
        with self._told():
            for name, path in files.items():
                found = _sha256(path)
                if name in known and known[name]["sha256"] == found:
                    continue
                artifact = upload_artifact(
                    artifact_store=self.store, file_path=str(path), study_or_trial=ledger.study(), mimetype=_MIME
                )
                known[name] = {"artifact": artifact, "sha256": found, "bytes": path.stat().st_size}
        ledger.set_files(known)

    def download(self, ledger: Ledger, folder: Path) -> list[str]:
        """Put the files of a study into a folder; those that are there already, of the same content, are left.

        Returns:
            Names of those that were fetched.

        Raises:
            StorageError: If the store cannot be reached, a file is not in it, or its content is another one.
        """
        fetched = []
        for name, facts in ledger.files.items():
            target = folder / name
            if not target.resolve().is_relative_to(folder.resolve()):
                raise StorageError(f"artifacts {self.where}: {name!r} would leave the folder {folder}")
            if target.exists() and _sha256(target) == facts["sha256"]:
                continue
            with self._told(), atomic(target) as temporary:
                temporary.unlink()  # Optuna writes no file that exists
                download_artifact(
                    artifact_store=self.store, file_path=str(temporary), artifact_id=str(facts["artifact"])
                )
                if _sha256(temporary) != facts["sha256"]:
                    raise StorageError(
                        f"artifacts {self.where}: {name} is damaged: its content is not what was put there"
                    )
            fetched.append(name)
        return fetched

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except ArtifactNotFound as error:
            raise StorageError(f"artifacts {self.where}: {error}; is it the store that the run was given?") from None
        except self.failures as error:
            raise StorageError(f"artifacts {self.where}: {error}") from None


_MIME = "application/octet-stream"


class _Prefixed:
    """A store whose names begin alike, so that a bucket can hold other things too."""

    def __init__(self, store: _ArtifactStore, prefix: str) -> None:
        self._store, self._prefix = store, prefix

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Open an artifact for reading."""
        return self._store.open_reader(self._prefix + artifact_id)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Write an artifact."""
        self._store.write(self._prefix + artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        """Remove an artifact."""
        self._store.remove(self._prefix + artifact_id)


def _bucket(url: str) -> Artifacts:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"artifacts {url}: expected s3://BUCKET/PREFIX")
    if importlib.util.find_spec("boto3") is None:
        raise StorageError(f"artifacts {url}: boto3 is not installed: pip install 'sekron-search[s3]'")
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    failures = (OSError, Boto3Error, BotoCoreError, ClientError)
    try:
        client: Any = boto3.client("s3")
        client.head_bucket(Bucket=bucket)
    except failures as error:
        # Credentials may allow to read and write a bucket, but not to ask for it.
        if not (isinstance(error, ClientError) and error.response["Error"]["Code"] == "403"):
            raise StorageError(f"artifacts {url}: {error}") from None
    store: _ArtifactStore = Boto3ArtifactStore(bucket, client)
    if prefix := prefix.strip("/"):
        store = _Prefixed(store, prefix + "/")
    return Artifacts(store, url, failures, client.close)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
