from __future__ import annotations

import posixpath
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.artifacts.storage import Location, open_location
from safetydpo.errors import SafetyDPOError, UsageError


@pytest.fixture
def remote(tmp_path: Path) -> Location:
    """A filesystem that is not the local one: what an object store sees of our code."""
    (tmp_path / "bucket").mkdir()
    return Location(pafs.SubTreeFileSystem(str(tmp_path / "bucket"), pafs.LocalFileSystem()), "pool")


def all_names(folder: Path) -> list[str]:
    """Every file, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_people_read_places_as_they_typed_them(tmp_path: Path, remote: Location, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert open_location("runs/smoke").shown == "runs/smoke"
    assert open_location("../other").shown == str(tmp_path.parent / "other")
    assert open_location(".").shown == str(tmp_path)
    assert remote.shown == str(remote)


def test_round_trip_and_overwriting(store: Location):
    place = store / "a/b" / "c.bin"
    assert not place.exists()
    place.write_bytes(b"one")
    place.write_bytes(b"two\0")
    assert place.read_bytes() == b"two\0"
    assert (place.is_file(), place.is_folder(), (store / "a").is_folder(), place.name) == (True, False, True, "c.bin")
    assert all_names(Path(store.path)) == ["a/b/c.bin"]


def test_round_trip_elsewhere(remote: Location):
    remote.make_folder()
    (remote / "x").write_bytes(b"123")
    assert (remote / "x").read_bytes() == b"123"
    assert [child.name for child in remote.list()] == ["x"]
    assert str(remote / "x").endswith("://pool/x")
    assert not remote.is_local
    with pytest.raises(SafetyDPOError, match="expected a local path, found .*://pool: copy it to a local folder first"):
        _ = remote.local_path


def test_list_and_walk_are_sorted_and_hide_dotted_names(store: Location):
    for name in ("b/2", "b/1", "a", ".hidden", "b/.3", ".git/x", "b.c"):
        (store / name).write_bytes(b"")
    assert [child.name for child in store.list()] == ["a", "b", "b.c"]
    assert [place.path.removeprefix(store.path) for place in store.walk()] == ["/a", "/b.c", "/b/1", "/b/2"]


def test_a_hidden_parent_hides_nothing(tmp_path: Path):
    """Only names below the folder count: a store under ~/.cache lists its files."""
    store = open_location(str(tmp_path / ".cache"))
    (store / "x").write_bytes(b"")
    assert [place.name for place in store.walk()] == ["x"]


def test_an_absent_folder_is_empty(store: Location):
    assert store.list() == []
    assert list(store.walk()) == []
    store.delete()


def test_delete_a_file_then_the_folder(store: Location):
    (store / "a").write_bytes(b"")
    (store / "b/c").write_bytes(b"")
    (store / "a").delete()
    assert [child.name for child in store.list()] == ["b"]
    store.delete()
    assert not store.exists()


@pytest.mark.parametrize("part", ["", "/etc/passwd", "..", "a/../../b", "a//b", "./a", "a/", "a\0b"])
def test_leaving_the_folder_is_refused(store: Location, part: str):
    with pytest.raises(SafetyDPOError, match="expected a plain relative path below .*store, found"):
        _ = store / part


@given(st.text(alphabet="ab./\0\\ ", max_size=12))
def test_a_part_is_refused_or_stays_below(part: str):
    base = Location(pafs.LocalFileSystem(), "/base/folder")
    try:
        path = (base / part).path
    except SafetyDPOError:
        return
    assert path == posixpath.normpath(path)
    assert path == f"/base/folder/{part}"


def test_reading_nothing(store: Location):
    with pytest.raises(SafetyDPOError, match="expected a file at .*/gone, found nothing: run the stage that makes it"):
        (store / "gone").read_bytes()


def test_reading_a_folder(store: Location):
    with pytest.raises(SafetyDPOError, match="expected a readable file at .*store, found: "):
        store.make_folder().read_bytes()


def test_writing_below_a_file(store: Location):
    (store / "a").write_bytes(b"old")
    with pytest.raises(SafetyDPOError, match=r"expected to write 1 bytes to .*/a/b, found: .*; free space or choose"):
        (store / "a" / "b").write_bytes(b"x")
    assert (store / "a").read_bytes() == b"old"


def test_a_folder_below_a_file(store: Location):
    (store / "a").write_bytes(b"old")
    with pytest.raises(SafetyDPOError, match=r"expected to make the folder .*/a/b, found: .*; free space or choose"):
        (store / "a" / "b").make_folder()


def test_listing_a_file(store: Location):
    (store / "a").write_bytes(b"x")
    with pytest.raises(SafetyDPOError, match=r"expected to list .*/a, found: .*; mend the cause, then run the same"):
        (store / "a").list()


def test_writing_piece_by_piece_and_renaming_a_folder(store: Location):
    with ((store / "new").make_folder() / "x").stream_out() as stream:
        stream.write(b"12")
        stream.write(b"3")
    (store / "new").rename_folder(store / "named")
    assert (store / "named/x").read_bytes() == b"123"
    assert not (store / "new").exists()
    (store / "other/y").write_bytes(b"")
    with pytest.raises(SafetyDPOError, match=r"expected to make the folder .*/named, found: .*not empty"):
        (store / "other").rename_folder(store / "named")
    with (
        pytest.raises(SafetyDPOError, match=r"expected to write to .*/gone/x, found: "),
        (store / "gone/x").stream_out() as stream,
    ):
        pass


def test_the_folder_above(store: Location):
    assert (store / "a/b").parent == store / "a"


def test_parts_of_a_file(store: Location):
    (store / "a").write_bytes(b"0123")
    assert (store / "a").size_bytes() == 4
    with (store / "a").open_random_access() as file:
        file.seek(2)
        assert file.read(1) == b"2"
    with pytest.raises(SafetyDPOError, match="expected a file at .*/gone, found nothing: run the stage that makes it"):
        (store / "gone").size_bytes()
    with pytest.raises(SafetyDPOError, match="expected a readable file at .*/gone, found: "):
        (store / "gone").open_random_access()


def test_writing_over_a_folder_leaves_nothing_behind(store: Location):
    (store / "a/b").write_bytes(b"old")
    with pytest.raises(SafetyDPOError, match="expected to write 1 bytes to .*/a, found: .*Is a directory"):
        (store / "a").write_bytes(b"x")
    assert all_names(Path(store.path)) == ["a/b"]


def test_writing_elsewhere_fails_in_the_same_words(remote: Location):
    with pytest.raises(SafetyDPOError, match=r"expected to write 1 bytes to .*://pool/no/x, found: .*; free space"):
        (remote / "no" / "x").write_bytes(b"x")


FULL_DISK = """
import resource, signal, sys
from safetydpo.artifacts.storage import open_location
from safetydpo.errors import SafetyDPOError
place = open_location(sys.argv[1]) / "x"
place.write_bytes(b"old")
# A write beyond the limit fails in the kernel, part of the data already on the disk, as on a full one.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    place.write_bytes(b"n" * 1_000_000)
except SafetyDPOError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_file_and_no_other(store: Location):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, store.path], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith(
        f"expected to write 1,000,000 bytes to {store.path}/x, found: [Errno 27] File too large"
    )
    assert "free space or choose another folder, then run the same command again" in done.stdout
    assert (store / "x").read_bytes() == b"old"
    assert all_names(Path(store.path)) == ["x"]


def test_a_reader_never_sees_half_a_file(store: Location):
    """One thread rewrites the file, the other reads: every content read is one of the two written."""
    place = store / "x"
    contents = (b"a" * 200_000, b"b" * 300_000)
    place.write_bytes(contents[0])
    writer = threading.Thread(target=lambda: [place.write_bytes(contents[i % 2]) for i in range(20)])
    writer.start()
    while writer.is_alive():
        assert place.read_bytes() in contents
    writer.join()


def test_open_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/someone")
    assert open_location("runs/x").path == str(tmp_path / "runs" / "x")
    assert open_location("~/runs").path == "/someone/runs"
    assert open_location(f"file://{tmp_path}/").path == str(tmp_path)
    assert open_location("/a/../b").local_path == Path("/b")
    assert str(open_location("/b")) == "/b"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "found '': name a folder or a bucket"),
        (" ", "found ' ': name a folder or a bucket"),
        ("s3://", "found 's3://': name a folder or a bucket"),
        ("gopher://host/x", "found 'gopher://host/x': Unrecognized filesystem type"),
    ],
)
def test_bad_addresses(address: str, message: str):
    with pytest.raises(UsageError, match=f"expected a local path or s3://bucket/prefix, {message}"):
        open_location(address)
