"""Start the processes of `racing` side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from safetydpo.artifacts.storage import Location

ROOT = Path(__file__).resolve().parents[2]


def race(what: str, place: Location, count: int) -> dict[str, list[int]]:
    """Run two processes at once; return what each of them won."""
    address = str(place) if place.is_local else f"s3://{place.path}"
    commands = {
        name: subprocess.Popen(
            [sys.executable, "-m", "tests.artifacts.racing", what, address, name, str(count)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    }
    won = {name: json.loads(process.communicate(timeout=120)[0]) for name, process in commands.items()}
    assert all(process.returncode == 0 for process in commands.values())
    return won
