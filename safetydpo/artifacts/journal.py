"""An append-only file of JSON lines on a local disk: what was appended survives a kill, and is never lost or doubled.

Every line is flushed to the disk before `append` returns. A line that a kill cut short has no line end; it is taken off
when the journal is opened again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.schemas import canonical_json
from safetydpo.errors import SafetyDPOError, UsageError


class Journal:
    """The open journal of one process; a second process is refused until it is closed.

    Attributes:
        rows: What stood in the file when it was opened, in order of appending.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file, readable by its owner only.

        Raises:
            UsageError: if another process has it open.
            SafetyDPOError: if it cannot be opened, or a whole line of it is no JSON object.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise SafetyDPOError(
                f"expected to open the journal {path}, found: {error}; choose another folder"
            ) from error
        try:
            self._lock()
            self.rows: list[dict[str, Any]] = self._read_whole_lines()
            _sync_folder(path.parent)
        except BaseException:
            self._file.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; it is on the disk when this returns.

        Raises:
            SafetyDPOError: if the disk is full or gone; rows appended before are kept.
        """
        data = memoryview(canonical_json(dict(row)) + b"\n")
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise SafetyDPOError(
                f"expected to append to {self._path}, found: {error}; free space, then run the same command again"
            ) from error

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"expected {self._path} to be free, found another process that writes to it: wait for it, or choose "
                "another folder"
            ) from error

    def _read_whole_lines(self) -> list[dict[str, Any]]:
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
        self._file.seek(whole)
        # Split at line ends only: JSON text may hold other characters that `splitlines` takes for one.
        return [self._parse(line, number) for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1)]

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = parse_json(line)
        except ValueError as error:
            raise SafetyDPOError(
                f"expected JSON in line {number} of {self._path}, found: {error}; remove that line, which asks its "
                "request again"
            ) from error
        if not isinstance(row, dict):
            raise SafetyDPOError(
                f"expected a JSON object in line {number} of {self._path}, found a {type(row).__name__}; remove it"
            )
        return row


def _sync_folder(folder: Path) -> None:
    # A new file is only there after a power cut if its folder was flushed too.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
