"""Against a real S3 server: what is written comes back, errors say what to do, credentials appear nowhere."""

from __future__ import annotations

import contextlib
import copy
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import torch

from safetydpo.artifacts import object_store, storage
from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, read_adapter, read_adapter_metadata, write_adapter
from safetydpo.artifacts.object_store import PatientS3, one_line, s3_remedy, worker_variables
from safetydpo.artifacts.records import (
    ArtifactKey,
    Record,
    artifact_folder,
    check_run_identity,
    close_artifact,
    find_closed,
    read_pointers,
    write_pointer,
)
from safetydpo.artifacts.schemas import SELECTIONS
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import read_table, table_from_rows, write_table
from safetydpo.errors import SafetyDPOError, UsageError
from tests.ports import free_ports
from tests.s3_server import ACCESS_KEY, BUCKET, PATIENCE, SECRET_KEY, S3Server


def test_files_come_back_small_and_in_several_parts(s3_store: Location):
    for size in (0, 5, 12_000_000):
        data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        (s3_store / "a" / "b.bin").write_bytes(data)
        assert (s3_store / "a" / "b.bin").read_bytes() == data
        assert (s3_store / "a" / "b.bin").size_bytes() == size
    with (s3_store / "a/b.bin").open_random_access() as file:
        file.seek(256 + 7)
        assert file.read(2) == b"\x07\x08"
    with (s3_store / "streamed").stream_out() as stream:
        stream.write(b"one")
        stream.write(b"two")
    assert (s3_store / "streamed").read_bytes() == b"onetwo"


def test_tables_records_pointers_and_adapters_come_back(s3_store: Location):
    rows = [{"pair_id": f"p{number}", "seed": number, "kept": True, "reason": "kept"} for number in range(5)]
    for index, row in enumerate(rows):
        write_table(s3_store / "selections" / f"{index}.parquet", table_from_rows([row], SELECTIONS))
    assert read_table(s3_store / "selections", SELECTIONS).to_pylist() == rows
    key = ArtifactKey("pairs", "x", {"seed": 1}, {}, 1)
    assert find_closed(s3_store, key) is None
    record = Record("pairs", "x", key.hash, 1, key.identity, key.inputs, "f")
    close_artifact(s3_store, key, record)
    assert find_closed(s3_store, key) == record
    run_dir = s3_store / "run"
    write_pointer(run_dir, "pairs", key)
    assert read_pointers(run_dir)["pairs"]["hash"] == key.hash
    check_run_identity(run_dir, {"seed": 1})
    with pytest.raises(UsageError, match=r"expected the config that s3://.*/run was started with, found other values"):
        check_run_identity(run_dir, {"seed": 2})
    layers = {"to_q": LoraLayer(torch.ones(2, 4), torch.ones(4, 2))}
    file = artifact_folder(s3_store, key) / "adapter.safetensors"
    write_adapter(file, layers, metadata=AdapterMetadata("base"))
    assert read_adapter(file)[0]["to_q"].down.equal(layers["to_q"].down)
    assert read_adapter_metadata(file).base_fingerprint == "base"


def test_a_folder_is_its_objects(s3_store: Location):
    """The server and pyarrow leave an empty prefix where the last object was; that is no folder."""
    for name in ("b/2", "b/1", "a", ".hidden", "b.c", "d/e/f"):
        (s3_store / name).write_bytes(b"x")
    assert [child.name for child in s3_store.list()] == ["a", "b", "b.c", "d"]
    assert [place.path.removeprefix(s3_store.path) for place in s3_store.walk()] == [
        "/a",
        "/b.c",
        "/b/1",
        "/b/2",
        "/d/e/f",
    ]
    assert (s3_store / "d").is_folder()
    (s3_store / "d/e/f").delete()
    raw = s3_store.filesystem.get_file_info([f"{s3_store.path}/d/e"])[0].type
    assert raw is pafs.FileType.Directory, "the prefix lingers, or this test tests nothing"
    for name in ("d", "d/e"):
        assert not (s3_store / name).exists()
    assert [child.name for child in s3_store.list()] == ["a", "b", "b.c"]
    (s3_store / "b").delete()
    (s3_store / "b").delete()
    assert not (s3_store / "b").exists()
    assert (s3_store / "never").make_folder().list() == []
    assert not (s3_store / "never").exists()


def test_deleting_everything_and_reading_nothing(s3_store: Location):
    (s3_store / "a/b").write_bytes(b"x")
    s3_store.delete()
    assert not s3_store.exists()
    s3_store.check_reachable()
    with pytest.raises(SafetyDPOError, match=r"expected a file at s3://.*/gone, found nothing: run the stage that"):
        (s3_store / "gone").read_bytes()
    with pytest.raises(SafetyDPOError, match=r"expected a file at s3://.*/gone, found nothing: run the stage that"):
        (s3_store / "gone").size_bytes()


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret-5511", "SIGNATURE_DOES_NOT_MATCH"),
        ("AWS_ACCESS_KEY_ID", "wrong-key-7788", "INVALID_ACCESS_KEY_ID"),
    ],
)
def test_wrong_credentials(s3_store: Location, monkeypatch: pytest.MonkeyPatch, name: str, value: str, code: str):
    (s3_store / "x").write_bytes(b"x")
    monkeypatch.setenv(name, value)
    refused = open_location(f"s3://{s3_store.path}")
    advice = (
        r"correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY \(or ~/.aws, or the machine's role\), then run the same"
    )
    texts = []
    for action in (refused.check_reachable, refused.list, lambda: (refused / "y").write_bytes(b"y")):
        with pytest.raises(SafetyDPOError, match=rf"expected .* s3://.*, found: .*{code}.*; {advice}") as caught:
            action()
        texts.append(str(caught.value))
    # Answers to HEAD have no body, so that S3 cannot say why.
    denied = "ACCESS_DENIED.*; correct the credentials, or have the bucket's policy allow what docs/storage.md lists"
    for action in ((refused / "x").read_bytes, (refused / "x").is_file, (refused / "x").open_random_access):
        with pytest.raises(SafetyDPOError, match=denied) as caught:
            action()
        texts.append(str(caught.value))
    for text in texts:
        assert "\n" not in text
        assert not [secret for secret in (value, ACCESS_KEY, SECRET_KEY) if secret in text]


def test_a_missing_bucket(s3_store: Location):
    nowhere = open_location("s3://no-such-bucket/x")
    message = r"NO_SUCH_BUCKET .*; create the bucket, or correct the address, then run the same command again"
    with pytest.raises(SafetyDPOError, match=rf"expected to list s3://no-such-bucket/x, found: .*{message}"):
        nowhere.check_reachable()
    with pytest.raises(
        SafetyDPOError, match=rf"expected to write 1 bytes to s3://no-such-bucket/x, found: .*{message}"
    ):
        nowhere.write_bytes(b"x")


def test_a_server_that_is_not_there_is_told_in_a_moment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_ports(1)[0]}")
    for name in object_store.SECRET_VARIABLES[:2]:
        monkeypatch.setenv(name, "x")
    started = time.time()
    with pytest.raises(
        SafetyDPOError,
        match=r"expected to list s3://bucket/x, found: .*NETWORK_CONNECTION.*; check AWS_ENDPOINT_URL_S3 \(unset for "
        r"Amazon\), AWS_REGION and the network, then run the same command again",
    ):
        open_location("s3://bucket/x").check_reachable()
    # With all its retries it would wait for 102 s, on any machine.
    assert time.time() - started < 30 * PATIENCE


def test_a_copy_keeps_the_number_of_retries(monkeypatch: pytest.MonkeyPatch):
    """Ray sends copies to its workers, made in this way; one of pyarrow's own would try more often."""
    for name in object_store.SECRET_VARIABLES[:2]:
        monkeypatch.setenv(name, "x")
    tries = []
    for make in (lambda filesystem: filesystem, copy.copy):
        with _hanging_up() as (port, connections):
            impatient = PatientS3(region="x", endpoint=f"127.0.0.1:{port}", scheme="http", retries=1)
            with pytest.raises(OSError, match="AWS Error"):
                make(impatient).get_file_info(["bucket/x"])
            tries.append(len(connections))
    assert tries == [2, 2]


@contextlib.contextmanager
def _hanging_up() -> Iterator[tuple[int, list[object]]]:
    """A server that hangs up on everybody: its port, and who came."""
    came: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, address = server.accept()
                    came.append(address)
                    connection.close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        yield server.getsockname()[1], came
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.slow
def test_requests_wait_for_a_server_that_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writing, reading and listing begun while it is gone: it is back after 5 s, the requests a little later."""
    server = S3Server(tmp_path).start()
    try:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        store = open_location(f"s3://{BUCKET}/x")
        sent = Location(copy.copy(store.filesystem), store.path)
        (store / "a").write_bytes(b"kept")
        server.kill()
        again = threading.Timer(5.0, server.start)
        again.start()
        started = time.time()
        with ThreadPoolExecutor(3) as threads:
            written = threads.submit((sent / "b").write_bytes, b"n" * 12_000_000)
            read = threads.submit((sent / "a").read_bytes)
            listed = threads.submit(sent.list)
            assert read.result() == b"kept"
            assert (sent / "a") in listed.result()
            written.result()
        assert time.time() - started > 4.9
        again.join()
        assert (store / "b").size_bytes() == 12_000_000
    finally:
        server.stop()


class BreaksOff:
    """Stands for a store whose answers end in their middle so many times."""

    type_name = "s3"

    def __init__(self, times: int, said: str) -> None:
        self.times, self.said, self.asked = times, said, 0

    def open_input_stream(self, _path: str) -> pa.BufferReader:
        self.asked += 1
        if self.asked <= self.times:
            raise OSError(self.said)
        return pa.BufferReader(b"kept")


def test_an_answer_that_breaks_off_is_asked_for_again(monkeypatch: pytest.MonkeyPatch):
    """Four times at most; another error is told at once."""
    monkeypatch.setattr(storage, "READ_PAUSE_SECONDS", 0.0)
    said = "AWS Error INTERNAL_FAILURE during GetObject operation: Failed to flush response stream (eof: 0, bad: 1)"
    for times, text, asked, is_read in (
        (0, said, 1, True),
        (4, said, 5, True),
        (5, said, 5, False),
        (1, "no", 1, False),
    ):
        store = BreaksOff(times, text)
        location = Location(cast(pafs.FileSystem, store), "bucket/x")
        if is_read:
            assert location.read_bytes() == b"kept"
        else:
            with pytest.raises(SafetyDPOError, match=r"expected a readable file at s3://bucket/x, found: "):
                location.read_bytes()
        assert store.asked == asked


def test_nothing_that_is_sent_to_a_worker_holds_credentials(s3_store: Location):
    content = str(s3_store.filesystem.__reduce__())
    assert "127.0.0.1" in content
    for secret in (ACCESS_KEY, SECRET_KEY):
        assert secret not in content
    rebuilt = copy.copy(s3_store.filesystem)
    assert isinstance(rebuilt, PatientS3)
    assert rebuilt.equals(s3_store.filesystem)
    assert rebuilt.type_name == "s3"


def test_workers_are_told_where_and_never_with_what(monkeypatch: pytest.MonkeyPatch):
    for name in (*object_store.ENDPOINT_VARIABLES, *object_store.REGION_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    assert worker_variables() == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert worker_variables() == {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1", "AWS_REGION": "eu-central-1"}


@pytest.mark.parametrize(
    "address", ["s3://KEY:hush@bucket/x", "s3://hush@bucket", "s3://bucket:9000/hush", "s3://KEY:hu/sh@bucket"]
)
def test_credentials_in_an_address_are_refused_and_not_repeated(address: str):
    with pytest.raises(
        UsageError, match=r"expected s3://bucket/prefix, found more .*: credentials belong into"
    ) as caught:
        open_location(address)
    assert "hu" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://bucket/x?access_key=hush", "found a question mark behind 's3://bucket/x': set the endpoint by AWS_EN"),
        ("s3:///prefix", "found 's3:///prefix': name a bucket of 3 to 63 small letters"),
        ("s3://ab/x", "found 's3://ab/x': name a bucket of 3 to 63 small letters"),
        ("s3://Bucket", "found 's3://Bucket': name a bucket"),
        ("s3://bucket//x", "found 's3://bucket//x': write the prefix plainly"),
        ("s3://bucket/../x", "found 's3://bucket/../x': write the prefix plainly"),
    ],
)
def test_addresses_that_are_more_than_bucket_and_prefix(address: str, message: str):
    with pytest.raises(UsageError, match=f"expected s3://bucket/prefix, {message}") as caught:
        open_location(address)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:9000",
        "ftp://host",
        "http://",
        "http://key:hush@host",
        "http://host/path",
        "http://host:x",
        "http://h?a",
    ],
)
@pytest.mark.parametrize("name", object_store.ENDPOINT_VARIABLES)
def test_an_endpoint_that_is_no_plain_url(monkeypatch: pytest.MonkeyPatch, name: str, url: str):
    for other in object_store.ENDPOINT_VARIABLES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, url)
    with pytest.raises(
        UsageError, match=f"expected a URL such as http://127.0.0.1:9000 in {name}, found something else: give scheme"
    ) as caught:
        open_location("s3://bucket/x")
    assert "hush" not in str(caught.value)


def test_region_and_endpoint_come_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    """The special variable wins over the general one; without a region a server of one's own gets the usual one."""
    for name in (*object_store.ENDPOINT_VARIABLES, *object_store.REGION_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://general.example:1")
    location = open_location("s3://bucket/pool/")
    assert isinstance(location.filesystem, PatientS3)
    assert location.filesystem.region == "us-east-1"
    assert (location.path, location.is_local, str(location / "x")) == ("bucket/pool", False, "s3://bucket/pool/x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://special.example:2/")
    filesystem = open_location("s3://bucket").filesystem
    assert filesystem.equals(PatientS3(region="eu-west-1", endpoint="special.example:2", scheme="http"))
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert open_location("s3://bucket").filesystem.region == "eu-north-1"


def test_amazon_is_asked_for_the_region_of_a_bucket(monkeypatch: pytest.MonkeyPatch):
    """The network is not asked in a test: it takes seconds to give up."""
    for name in (*object_store.ENDPOINT_VARIABLES, *object_store.REGION_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(object_store.pafs, "resolve_s3_region", lambda bucket: f"region-of-{bucket}")
    assert open_location("s3://bucket/x").filesystem.region == "region-of-bucket"

    def fail(bucket: str) -> str:
        raise OSError(f"When resolving region for bucket '{bucket}':\n could not resolve host")

    monkeypatch.setattr(object_store.pafs, "resolve_s3_region", fail)
    with pytest.raises(
        SafetyDPOError,
        match="expected Amazon's S3 to say where bucket 'bucket' is, found: When resolving region for bucket 'bucket': "
        "could not resolve host; set AWS_REGION, or AWS_ENDPOINT_URL_S3 for another server, or check the bucket's name",
    ):
        open_location("s3://bucket/x")


def test_what_an_error_says_never_shows_a_credential(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    assert one_line(OSError("bad\n hush-hush key")) == "bad (AWS_SECRET_ACCESS_KEY) key"
    assert one_line(pa.ArrowInvalid()) == "ArrowInvalid"


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("No space left on device", None),
        ("AWS Error EXPIRED_TOKEN during", "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("AWS Error ACCESS_DENIED during", "correct the credentials, or have the bucket's policy allow"),
        ("AWS Error SLOW_DOWN during", "look at the server's own log"),
    ],
)
def test_remedies(text: str, remedy: str | None):
    found = s3_remedy(text)
    assert found is None if remedy is None else found is not None and found.startswith(remedy)


def test_a_local_place_is_not_asked(store: Location):
    store.check_reachable()
    assert not store.exists()
