"""Folders for Ray's own state that no later run reads, and the removal of those that a killed process has left."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from safetydpo.artifacts.attempts import is_alive, machine
from safetydpo.artifacts.json_text import parse_json

PREFIX = "safetydpo-ray-"
OWNER_FILE = "owner.json"
_open: set[str] = set()


@contextmanager
def ray_state_folder() -> Iterator[str]:
    """Yield a folder for Ray's own state; it is removed at the end, or by the next process here if this is killed."""
    _sweep()
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder:
        owner = {"machine": machine(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        (Path(folder) / OWNER_FILE).write_text(json.dumps(owner))
        _open.add(folder)
        try:
            yield folder
        finally:
            _open.discard(folder)


def remove_open_folders() -> None:
    """Remove the folders of threads that will never end them, as the last thing that this process does."""
    for folder in _open:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            owner = parse_json((folder / OWNER_FILE).read_text())
            is_left = owner["machine"] == machine() and not is_alive(owner["pid"], owner["started"])
        except (OSError, ValueError, KeyError, TypeError):
            # Just being made, or another user's.
            continue
        if is_left:
            shutil.rmtree(folder, ignore_errors=True)
