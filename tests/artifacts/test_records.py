from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.artifacts import records
from safetydpo.artifacts.leases import hold_lease
from safetydpo.artifacts.records import (
    ArtifactKey,
    Record,
    artifact_folder,
    check_run_identity,
    close_artifact,
    files_folder,
    find_closed,
    read_pointers,
    read_record,
    write_pointer,
    write_pointers,
)
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError, UsageError
from tests.artifacts.racers import race

KEY = ArtifactKey("pairs", "demo", identity={"seed": 0, "steps": 4}, inputs={"base": "f"}, recipe_version=1)


def record_of(key: ArtifactKey, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "stage": key.stage,
        "name": key.name,
        "hash": key.hash,
        "recipe_version": key.recipe_version,
        "identity": dict(key.identity),
        "inputs": dict(key.inputs),
        "fingerprint": "abc",
        "counts": {"rows": 2},
        "failed_units": ("x",),
        "seconds": 1.5,
    }
    return Record(**values | changes)


def test_key_by_hand():
    """The hash covers stage, identity, inputs and recipe version; the folder is name, dash, 12 digits of it."""
    expected = sha256_of(
        {"identity": {"seed": 0, "steps": 4}, "inputs": {"base": "f"}, "recipe_version": 1, "stage": "pairs"}
    )
    assert KEY.hash == expected
    assert KEY.folder_name == f"demo-{expected[:12]}"


@pytest.mark.parametrize(
    "change",
    [{"stage": "x"}, {"identity": {"seed": 1, "steps": 4}}, {"inputs": {"base": "g"}}, {"recipe_version": 2}],
    ids=str,
)
def test_whatever_changes_the_content_changes_the_hash(change: dict[str, Any]):
    assert dataclasses.replace(KEY, **change).hash != KEY.hash


def test_a_name_does_not():
    assert dataclasses.replace(KEY, name="other").hash == KEY.hash


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(), max_size=4), st.randoms())
def test_the_order_of_settings_does_not(identity: dict[str, int], random):
    items = list(identity.items())
    random.shuffle(items)
    assert dataclasses.replace(KEY, identity=dict(items)).hash == dataclasses.replace(KEY, identity=identity).hash


def test_open_then_closed(store: Location):
    folder = artifact_folder(store, KEY)
    assert folder.path == f"{store.path}/pairs/{KEY.folder_name}"
    assert find_closed(store, KEY) is None
    (folder / "data.parquet").write_bytes(b"half the work")
    assert find_closed(store, KEY) is None, "data without a record is no artifact"
    close_artifact(store, KEY, record_of(KEY))
    assert find_closed(store, KEY) == record_of(KEY)
    assert read_record(folder) == record_of(KEY)


def test_files_lie_with_the_attempt_that_the_record_names(store: Location):
    """Artifacts from before there were attempts name none: theirs lie beside the record."""
    folder = store / "experts" / "hate"
    assert files_folder(folder, record_of(KEY)) == folder
    assert files_folder(folder, record_of(KEY, details={"attempt": 3})) == folder / "attempt-3"


def test_a_record_that_json_cannot_hold_closes_nothing(store: Location):
    with pytest.raises(ValueError, match="not JSON compliant"):
        close_artifact(store, KEY, record_of(KEY, details={"loss": float("nan")}))
    assert find_closed(store, KEY) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"failed_units": []}', '{"failed_units": [], "colour": 1}', "\xff"]
)
def test_a_damaged_record(store: Location, text: str):
    folder = artifact_folder(store, KEY)
    (folder / "record.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        SafetyDPOError,
        match=r"expected a record at .*/record\.json, found: .*; delete that folder and run its stage again",
    ):
        find_closed(store, KEY)


def test_the_record_of_another_artifact(store: Location):
    close_artifact(store, KEY, record_of(KEY, hash="0" * 64))
    with pytest.raises(SafetyDPOError, match=f"expected hash {KEY.hash} in .*, found 0000.*: delete that folder"):
        find_closed(store, KEY)


def test_pointers(store: Location):
    assert read_pointers(store) == {}
    other = dataclasses.replace(KEY, stage="experts", name="hate")
    write_pointer(store, "pairs", KEY)
    write_pointer(store, "expert:hate", other)
    write_pointer(store, "pairs", KEY)
    assert read_pointers(store) == {
        "pairs": {"stage": "pairs", "folder": KEY.folder_name, "hash": KEY.hash},
        "expert:hate": {"stage": "experts", "folder": other.folder_name, "hash": other.hash},
    }


def test_two_processes_that_write_pointers_at_once_lose_none(place: Location):
    """Each writes 15 pointers one by one into the same file; all 30 are there in the end."""
    won = race("point", place, 15)
    assert won == {"a": list(range(15)), "b": list(range(15))}
    assert set(read_pointers(place)) == {f"{name}-{index}" for name in "ab" for index in range(15)}


def test_pointers_that_stand_there_are_not_written_again(store: Location):
    write_pointers(store, {"pairs": KEY, "experts": KEY})
    before = (store.local_path / "artifacts.json").stat().st_mtime_ns
    write_pointer(store, "pairs", KEY)
    assert (store.local_path / "artifacts.json").stat().st_mtime_ns == before


def test_pointers_that_somebody_holds_for_too_long_are_an_error(store: Location, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "POINTERS_PATIENCE_SECONDS", 0.2)
    with (
        hold_lease(store / records.POINTERS_LEASE),
        pytest.raises(SafetyDPOError, match=r"expected nobody else to write to .*\.pointers, found process \d+ on"),
    ):
        write_pointer(store, "pairs", KEY)
    assert read_pointers(store) == {}


def test_pointers_that_are_being_replaced_are_read_again(store: Location, monkeypatch: pytest.MonkeyPatch):
    """A torn reading, another one, and then the whole file: what pyarrow gives of an object that grows on S3."""
    write_pointers(store, {"pairs": KEY, "experts": KEY})
    whole = (store / "artifacts.json").read_bytes()
    readings = iter([b"", whole[:20], whole])
    monkeypatch.setattr(Location, "read_bytes", lambda _: next(readings))
    assert set(read_pointers(store)) == {"pairs", "experts"}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"artifacts": 3}', '{"artifacts": {"a": 3}}'])
def test_damaged_pointers(store: Location, text: str):
    (store / "artifacts.json").write_bytes(text.encode())
    with pytest.raises(
        SafetyDPOError,
        match=r"expected pointers to artifacts at .*/artifacts\.json, found: .*; delete it and run again",
    ):
        read_pointers(store)


def test_a_run_folder_keeps_its_identity(store: Location):
    check_run_identity(store, {"seed": 0, "dpo": {"steps": 4, "beta": 1.0}})
    check_run_identity(store, {"dpo": {"beta": 1.0, "steps": 4}, "seed": 0})
    assert json.loads((store / "identity.json").read_bytes()) == {"seed": 0, "dpo": {"steps": 4, "beta": 1.0}}


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({"seed": 0, "dpo": {"steps": 5}}, r"other values of identity\.dpo\.steps \(4 -> 5\): choose another"),
        ({"seed": 1, "dpo": {"steps": 5}}, r"identity\.dpo\.steps \(4 -> 5\), identity\.seed \(0 -> 1\): "),
        ({"seed": 0, "dpo": {"steps": 4, "rank": None}}, r"identity\.dpo\.rank \('<absent>' -> None\)"),
        ({"seed": 0, "dpo": {}}, r"identity\.dpo\.steps \(4 -> '<absent>'\)"),
        ({"seed": 0, "dpo": 3}, r"identity\.dpo \(\{'steps': 4\} -> 3\)"),
        ({"seed": 0.0, "dpo": {"steps": 4}}, r"identity\.seed \(0 -> 0\.0\)"),
    ],
)
def test_another_identity_names_each_field(store: Location, after: dict[str, Any], message: str):
    check_run_identity(store, {"seed": 0, "dpo": {"steps": 4}})
    with pytest.raises(UsageError, match=f"expected the config that .*store was started with, found .*{message}"):
        check_run_identity(store, after)
    assert json.loads((store / "identity.json").read_bytes()) == {"seed": 0, "dpo": {"steps": 4}}


def test_a_damaged_identity(store: Location):
    (store / "identity.json").write_bytes(b'{"seed": ')
    with pytest.raises(
        SafetyDPOError, match=r"expected the run's config as JSON at .*/identity\.json, found: .*; delete that file"
    ):
        check_run_identity(store, {"seed": 0})


def test_nothing_else_is_written(store: Location):
    close_artifact(store, KEY, record_of(KEY))
    write_pointer(store, "pairs", KEY)
    check_run_identity(store, {"seed": 0})
    names = sorted(str(path.relative_to(store.path)) for path in Path(store.path).rglob("*") if path.is_file())
    assert names == ["artifacts.json", "identity.json", f"pairs/{KEY.folder_name}/record.json"]
