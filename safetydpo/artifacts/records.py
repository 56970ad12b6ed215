"""Artifacts: folders named *name + hash*, closed by a `record.json` that is written last.

No record, no artifact. A closed artifact is never written again; asking for it again costs a look.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from safetydpo.artifacts.json_text import parse_json, parse_object
from safetydpo.artifacts.layout import IDENTITY_FILE, POINTERS_FILE, RECORD_FILE, attempt_folder, stage_folder
from safetydpo.artifacts.leases import hold_lease
from safetydpo.artifacts.schemas import canonical_json, sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError, UsageError

SHORT_HASH = 12
POINTERS_LEASE = ".pointers"
"""Folder of the lease on a run's pointers, hidden from listings."""
READ_PAUSE_SECONDS = 0.05
POINTERS_PATIENCE_SECONDS = 400.0
"""Above the five minutes after which the lease of a machine that is gone is nobody's."""


@dataclass(frozen=True)
class ArtifactKey:
    """What an artifact is: everything that changes its content, and nothing else."""

    stage: str
    name: str
    identity: Mapping[str, Any]
    inputs: Mapping[str, str]
    recipe_version: int

    @property
    def hash(self) -> str:
        """sha256 over stage, identity settings, fingerprints of inputs and recipe version (not the name)."""
        return sha256_of(
            {
                "stage": self.stage,
                "identity": dict(self.identity),
                "inputs": dict(self.inputs),
                "recipe_version": self.recipe_version,
            }
        )

    @property
    def folder_name(self) -> str:
        """Name and short hash."""
        return f"{self.name}-{self.hash[:SHORT_HASH]}"


@dataclass(frozen=True)
class Record:
    """The certificate of a closed artifact."""

    stage: str
    name: str
    hash: str
    recipe_version: int
    identity: Mapping[str, Any]
    inputs: Mapping[str, str]
    fingerprint: str
    counts: Mapping[str, int] = field(default_factory=dict)
    failed_units: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    started_at: str = ""
    seconds: float = 0.0


def artifact_folder(store: Location, key: ArtifactKey) -> Location:
    """Return the folder in which the artifact `key` stands or will stand."""
    return stage_folder(store, key.stage) / key.folder_name


def read_record(folder: Location) -> Record | None:
    """Return the record of a closed artifact, or None if the folder is open or absent.

    Raises:
        SafetyDPOError: if a record stands there but does not parse.
    """
    location = folder / RECORD_FILE
    if not location.is_file():
        return None
    try:
        content = parse_object(location.read_bytes())
        content["failed_units"] = tuple(content["failed_units"])
        record = Record(**content)
        _check_types(record)
    except (ValueError, TypeError, KeyError) as error:
        raise SafetyDPOError(
            f"expected a record at {location}, found: {error}; delete that folder and run its stage again"
        ) from error
    return record


def find_closed(store: Location, key: ArtifactKey) -> Record | None:
    """Return the record of the artifact `key` if it is closed.

    Raises:
        SafetyDPOError: if the folder holds the record of another artifact.
    """
    record = read_record(artifact_folder(store, key))
    if record is not None and record.hash != key.hash:
        raise SafetyDPOError(
            f"expected hash {key.hash} in {artifact_folder(store, key)}, found {record.hash}: delete that folder"
        )
    return record


def close_artifact(store: Location, key: ArtifactKey, record: Record) -> None:
    """Write `record.json`, after which the artifact exists."""
    write_record(artifact_folder(store, key), record)


def write_record(folder: Location, record: Record) -> None:
    """Write the record of a folder that stands where its user wants it, outside a store."""
    (folder / RECORD_FILE).write_bytes(encode_record(record))


def encode_record(record: Record) -> bytes:
    """Return the content of `record.json`."""
    return json.dumps(asdict(record), indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"


def files_folder(folder: Location, record: Record) -> Location:
    """Return where the files of a closed artifact lie: beside the record, or with the attempt that it names."""
    attempt = record.details.get("attempt")
    return folder if attempt is None else attempt_folder(folder, attempt)


def read_pointers(run_dir: Location) -> dict[str, dict[str, str]]:
    """Return {pointer name: {"stage", "folder", "hash"}} of a run folder; empty if it is new.

    Raises:
        SafetyDPOError: if the file of pointers does not parse.
    """
    location = run_dir / POINTERS_FILE
    if not location.is_file():
        return {}
    try:
        content = parse_settled(location)
        return {str(name): _pointer(pointer) for name, pointer in content["artifacts"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SafetyDPOError(
            f"expected pointers to artifacts at {location}, found: {error!r}; delete it and run again"
        ) from error


def parse_settled(location: Location) -> Any:
    """Parse a small JSON file that another command may be replacing; raise ValueError if it is none.

    pyarrow asks S3 for an object's size and then for that many bytes: of one that grew in between it gets the
    beginning. What reads twice the same is what stands there.
    """
    before = None
    while True:
        content = location.read_bytes()
        try:
            return parse_json(content)
        except ValueError:
            if content == before:
                raise
        before = content
        time.sleep(READ_PAUSE_SECONDS)


def write_pointer(run_dir: Location, name: str, key: ArtifactKey) -> None:
    """Point the run's `name` at artifact `key`; see `write_pointers`."""
    write_pointers(run_dir, {name: key})


def write_pointers(run_dir: Location, keys: Mapping[str, ArtifactKey]) -> None:
    """Point each of the run's names at its artifact; those that other commands write meanwhile stay.

    Raises:
        SafetyDPOError: if storage fails, or another command holds the file for longer than its writing can take.
    """
    wanted = {name: {"stage": key.stage, "folder": key.folder_name, "hash": key.hash} for name, key in keys.items()}
    if wanted.items() <= read_pointers(run_dir).items():
        return
    with hold_run_files(run_dir):
        pointers = read_pointers(run_dir) | wanted
        (run_dir / POINTERS_FILE).write_bytes(
            json.dumps({"artifacts": pointers}, indent=2, sort_keys=True).encode() + b"\n"
        )


@contextmanager
def hold_run_files(run_dir: Location) -> Iterator[None]:
    """Be the only one that reads and writes the small files of a run: two commands at once would lose an entry.

    Raises:
        SafetyDPOError: if storage fails, or another command holds them for longer than writing can take.
    """
    with hold_lease(run_dir / POINTERS_LEASE, patience_seconds=POINTERS_PATIENCE_SECONDS):
        yield


def check_run_identity(run_dir: Location, config: Mapping[str, Any]) -> None:
    """Bind a run folder to one identity config; refuse another.

    Raises:
        UsageError: naming every field that differs from the config of the folder's first run.
        SafetyDPOError: if the stored config does not parse.
    """
    location = run_dir / IDENTITY_FILE
    if not location.is_file():
        location.write_bytes(json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
        return
    try:
        before = parse_object(location.read_bytes())
        # Refuses numbers that are not finite.
        known = canonical_json(before)
    except ValueError as error:
        raise SafetyDPOError(
            f"expected the run's config as JSON at {location}, found: {error}; delete that file and run again"
        ) from error
    if known == canonical_json(config):
        return
    changed = sorted(_differences(before, config))
    raise UsageError(
        f"expected the config that {run_dir} was started with, found other values of {', '.join(changed)}: "
        "choose another execution.run_dir, or delete that folder (artifacts in the store are kept)"
    )


_ABSENT = "<absent>"


def _differences(before: Any, after: Any, prefix: str = "identity") -> list[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found: list[str] = []
        for key in sorted({*before, *after}):
            # A setting that is absent differs from one that is null.
            found += _differences(before.get(key, _ABSENT), after.get(key, _ABSENT), f"{prefix}.{key}")
        return found
    return [] if canonical_json(before) == canonical_json(after) else [f"{prefix} ({before!r} -> {after!r})"]


_TEXTS = ("stage", "name", "hash", "fingerprint", "started_at")
_GROUPS = ("identity", "inputs", "counts", "details", "versions")


def _check_types(record: Record) -> None:
    """Refuse a field of another type than its own: whoever reads a record relies on them."""
    fields: dict[str, Any] = {**dict.fromkeys(_TEXTS, str), **dict.fromkeys(_GROUPS, dict)}
    fields |= {"recipe_version": int, "seconds": int | float}
    values: dict[str, Any] = {"inputs": str, "versions": str, "counts": int | float}
    wrong = [name for name, kind in fields.items() if not isinstance(getattr(record, name), kind)]
    if not wrong:
        wrong = [name for name, kind in values.items() if not _all(getattr(record, name).values(), kind)]
    if not _all(record.failed_units, str):
        wrong.append("failed_units")
    if wrong:
        raise TypeError(f"{wrong[0]} of another type")


def _all(values: Iterable[Any], kind: Any) -> bool:
    return all(isinstance(value, kind) for value in values)


def _pointer(found: Any) -> dict[str, str]:
    pointer = {name: found[name] for name in ("stage", "folder", "hash")}
    if not _all(pointer.values(), str):
        raise TypeError("a pointer that is no text")
    return pointer
