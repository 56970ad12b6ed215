"""Exclusive creation and the ledger on a disk and on a real S3 server, with real processes that race."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from safetydpo.artifacts import exclusive_create
from safetydpo.artifacts.exclusive_create import NoExclusiveCreation
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.errors import SafetyDPOError
from tests.artifacts.racers import race
from tests.s3_server import BUCKET, S3Server


def test_only_the_first_creation_succeeds(place: Location) -> None:
    file = place / "folder" / "file"
    assert file.create_exclusively(b"mine")
    assert not file.create_exclusively(b"yours")
    assert file.read_bytes() == b"mine"
    assert [child.name for child in (place / "folder").list()] == ["file"]


def test_a_folder_that_another_command_takes_away_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def without_folder(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        shutil.rmtree(tmp_path / "batch")
        link(source, target)

    monkeypatch.setattr(os, "link", without_folder)
    file = open_location(str(tmp_path)) / "batch" / "lease" / "attempt-1"
    assert file.create_exclusively(b"mine")
    assert file.read_bytes() == b"mine"
    assert [child.name for child in file.parent.list()] == ["attempt-1"]


def test_of_two_processes_each_object_has_one_creator(place: Location) -> None:
    won = race("create", place, 20)
    assert sorted([*won["a"], *won["b"]]) == list(range(20))


def test_of_two_processes_each_task_is_published_once(place: Location) -> None:
    """Every task is leased once, and its record names the process that says it published it."""
    won = race("work", place, 12)
    assert sorted([*won["a"], *won["b"]]) == list(range(12))
    for name, indices in won.items():
        for index in indices:
            folder = place / f"task-{index}"
            assert json.loads((folder / "record.json").read_bytes()) == {"by": name}
            assert [lease.name for lease in (folder / "lease").list()] == ["attempt-1"]


def test_a_lost_answer_is_told_from_somebody_elses_object(s3_store: Location) -> None:
    """The first try worked, its answer was lost, the second is refused: the content says whose it is."""
    file = s3_store / "lease"
    assert file.create_exclusively(b"token of mine")
    assert file.create_exclusively(b"token of mine")
    assert not file.create_exclusively(b"token of another")


def test_an_object_that_goes_while_it_is_read_was_somebody_elses() -> None:
    """The server breaks its answer off; the next look finds nothing. Seen on SeaweedFS with two processes that race."""

    class Going:
        answers = iter([OSError("AWS Error INTERNAL_FAILURE: Failed to flush response stream"), FileNotFoundError("x")])

        def open_input_stream(self, _path: str) -> None:
            raise next(self.answers)

    assert not exclusive_create._stands_there(Going(), "bucket/lease", b"mine")  # type: ignore[arg-type]


def test_an_object_that_is_gone_again_was_somebody_elses(s3_store: Location) -> None:
    """A short lease: it stood there when it was to be created, and is deleted when its content is asked for."""
    found = exclusive_create._stands_there(s3_store.filesystem, f"{s3_store.path}/gone", b"mine")  # type: ignore[arg-type]
    assert not found


def test_the_probe_leaves_nothing_behind(s3_store: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive_create, "_REFUSING", set())
    assert (s3_store / "lease").create_exclusively(b"x")
    children = s3_store.filesystem.get_file_info(pafs.FileSelector(s3_store.path, recursive=True))
    assert [info.path for info in children if info.type is pafs.FileType.File] == [f"{s3_store.path}/lease"]


class _Ignoring(BaseHTTPRequestHandler):
    """An S3 server that says yes to everything, and knows no conditions."""

    protocol_version = "HTTP/1.1"  # pyarrow and botocore wait for "100 Continue", which 1.0 does not have

    def do_PUT(self) -> None:
        if self.headers.get("If-None-Match") == "*":
            self.server.conditions.append(self.path)  # type: ignore[attr-defined]
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def do_DELETE(self) -> None:
        self._answer(204)

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self, status: int = 200, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("ETag", '"0"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class _Without(_Ignoring):
    """An S3 server that says that it has no conditional writes, as some do."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.conditions.append(self.path)  # type: ignore[attr-defined]
        said = "<Code>NotImplemented</Code><Message>A header you provided implies functionality</Message>"
        self._answer(501, f"<Error>{said}</Error>".encode())


@contextmanager
def served(kind: type[_Ignoring], server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """Serve by `kind`, where the environment now leads."""
    fake = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    fake.conditions = []  # type: ignore[attr-defined]
    threading.Thread(target=fake.serve_forever, daemon=True).start()
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{fake.server_port}")
    yield fake
    fake.shutdown()
    fake.server_close()


@pytest.fixture
def ignoring(monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> Iterator[ThreadingHTTPServer]:
    with served(_Ignoring, s3_server, monkeypatch) as fake:
        yield fake


def test_a_server_without_conditional_writes_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, s3_server: S3Server
) -> None:
    with served(_Without, s3_server, monkeypatch) as fake:
        started = time.monotonic()
        with pytest.raises(
            NoExclusiveCreation,
            match=r"expected the S3 server at 127\.0\.0\.1:.* If-None-Match: \*, found that it cannot, AWS Error "
            r"NOT_IMPLEMENTED \(HTTP status 501\): A header .*: choose an execution\.store on a server that knows",
        ):
            (open_location(f"s3://{BUCKET}/store") / "lease").create_exclusively(b"mine")
        assert time.monotonic() - started < 10
        assert len(fake.conditions) == 1  # type: ignore[attr-defined]


def test_a_server_that_ignores_the_condition_is_found_out(ignoring: ThreadingHTTPServer) -> None:
    file = open_location(f"s3://{BUCKET}/store") / "lease"
    with pytest.raises(SafetyDPOError, match="to refuse to write over an object.*found that it writes"):
        file.create_exclusively(b"mine")
    assert len(ignoring.conditions) == 2  # type: ignore[attr-defined]
    assert all("/.exclusive-" in path for path in ignoring.conditions)  # type: ignore[attr-defined]


def test_a_server_that_is_gone_is_named_after_a_while(
    s3_store: Location, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exclusive_create, "CREATE_SECONDS", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    file = open_location(f"s3://{BUCKET}/store") / "lease"
    with pytest.raises(SafetyDPOError, match="expected to create 4 bytes at.*check AWS_ENDPOINT_URL_S3"):
        file.create_exclusively(b"mine")


def test_wrong_credentials_are_refused_at_once(s3_store: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-of-a-test")
    uncached = exclusive_create._conditional_client.__wrapped__
    monkeypatch.setattr(exclusive_create, "_conditional_client", uncached)
    with pytest.raises(SafetyDPOError, match="correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        (s3_store / "lease").create_exclusively(b"mine")


def test_a_missing_bucket_is_named(s3_store: Location) -> None:
    with pytest.raises(SafetyDPOError, match="create the bucket, or correct the address"):
        replace(s3_store, path="no-such-bucket/lease").create_exclusively(b"mine")


def test_a_file_system_without_exclusive_creation_is_refused() -> None:
    place = Location(pafs._MockFileSystem(), "lease")
    with pytest.raises(SafetyDPOError, match="expected a local disk or S3 for exclusive creation, found mock"):
        place.create_exclusively(b"mine")


def test_a_full_or_forbidden_place_leaves_nothing(store: Location) -> None:
    (store / "file").write_bytes(b"")
    with pytest.raises(SafetyDPOError, match="expected to create 1 bytes at .*file/lease, found"):
        (store / "file" / "lease").create_exclusively(b"x")


def test_a_link_that_worked_although_the_answer_says_otherwise(
    store: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server may repeat a request whose answer got lost; the temporary file then has two names."""
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert (store / "lease").create_exclusively(b"mine")
    assert [child.name for child in store.local_path.iterdir()] == ["lease"]
