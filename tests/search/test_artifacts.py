from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sekron_search.errors import StorageError
from sekron_search.search.artifacts import Artifacts
from sekron_search.search.ledger import Ledger


class Bucket(BaseHTTPRequestHandler):
    """What an S3-compatible store answers to boto3, by the path of the object."""

    objects: dict[str, bytes]

    def do_HEAD(self) -> None:
        self._answer(200 if self.path.rstrip("/") == "/bucket" else 404)

    def do_PUT(self) -> None:
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200)

    def do_GET(self) -> None:
        if self.path in self.objects:
            self._answer(200, self.objects[self.path])
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>")

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"0"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The objects of an S3-compatible store, which boto3 reaches at s3://bucket."""
    handler = type("Handler", (Bucket,), {"objects": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    yield handler.objects  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(str(tmp_path / "study.journal"), "toy", objectives=["divergence"], facts={}) as opened:
        yield opened


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "run" / "tables").mkdir(parents=True)
    (tmp_path / "run" / "layout.json").write_text("{}")
    (tmp_path / "run" / "tables" / "0a.safetensors").write_bytes(bytes(range(256)) * 1000)
    return {name: tmp_path / "run" / name for name in ("layout.json", "tables/0a.safetensors")}


@pytest.fixture(params=["folder", "s3"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Artifacts]:
    if request.param == "s3":
        request.getfixturevalue("bucket")
    opened = Artifacts.open("s3://bucket/runs/one" if request.param == "s3" else tmp_path / "artifacts")
    yield opened
    opened.release()


def test_files_come_back_as_they_were(
    artifacts: Artifacts, ledger: Ledger, files: dict[str, Path], tmp_path: Path
) -> None:
    artifacts.upload(ledger, files)
    elsewhere = tmp_path / "elsewhere"
    assert sorted(artifacts.download(ledger, elsewhere)) == sorted(files)
    assert {name: (elsewhere / name).read_bytes() for name in files} == {n: p.read_bytes() for n, p in files.items()}
    assert artifacts.download(ledger, elsewhere) == []
    (elsewhere / "layout.json").write_text("[]")
    assert artifacts.download(ledger, elsewhere) == ["layout.json"]
    assert (elsewhere / "layout.json").read_text() == "{}"


def test_a_file_is_uploaded_again_only_if_it_changed(ledger: Ledger, files: dict[str, Path], tmp_path: Path) -> None:
    artifacts = Artifacts.open(tmp_path / "artifacts")
    artifacts.upload(ledger, files)
    before = ledger.files
    artifacts.upload(ledger, files)
    assert ledger.files == before
    files["layout.json"].write_text('{"granularity": 8}')
    artifacts.upload(ledger, files)
    changed = [name for name in before if ledger.files[name] != before[name]]
    assert changed == ["layout.json"]


def test_a_bucket_holds_other_things_too(
    bucket: dict[str, bytes], ledger: Ledger, files: dict[str, Path], tmp_path: Path
) -> None:
    artifacts = Artifacts.open("s3://bucket/runs/one/")
    artifacts.upload(ledger, files)
    assert sorted(bucket) == sorted(f"/bucket/runs/one/{facts['artifact']}" for facts in ledger.files.values())
    bucket.clear()
    with pytest.raises(StorageError, match=r"s3://bucket/runs/one/: .*was not found; is it the store that the run"):
        artifacts.download(ledger, tmp_path / "elsewhere")
    artifacts.release()
    with pytest.raises(StorageError, match="s3://another: "):
        Artifacts.open("s3://another")


def test_damaged_files_are_refused(ledger: Ledger, files: dict[str, Path], tmp_path: Path) -> None:
    artifacts = Artifacts.open(tmp_path / "artifacts")
    artifacts.upload(ledger, files)
    (tmp_path / "artifacts" / ledger.files["layout.json"]["artifact"]).write_text("[]")
    with pytest.raises(StorageError, match=r"layout\.json is damaged"):
        artifacts.download(ledger, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / "layout.json").exists()


def test_files_stay_in_the_folder(ledger: Ledger, files: dict[str, Path], tmp_path: Path) -> None:
    artifacts = Artifacts.open(tmp_path / "artifacts")
    artifacts.upload(ledger, {"../outside": files["layout.json"]})
    with pytest.raises(StorageError, match=r"'\.\./outside' would leave the folder"):
        artifacts.download(ledger, tmp_path / "elsewhere")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [("gs://bucket", "expected a folder or s3://BUCKET/PREFIX"), ("s3:///prefix", "expected s3://BUCKET/PREFIX")],
)
def test_a_store_of_another_kind_is_refused(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        Artifacts.open(url)
