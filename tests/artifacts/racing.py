"""Processes of the tests that race for leases; run as `python -m tests.artifacts.racing WHAT URI NAME COUNT`.

Each prints, as JSON, what it won.
"""

from __future__ import annotations

import json
import sys
import time
import uuid

from safetydpo.artifacts.attempts import Standing, look_at, publish, take_lease, this_process
from safetydpo.artifacts.leases import hold_lease
from safetydpo.artifacts.records import ArtifactKey, write_pointer
from safetydpo.artifacts.storage import Location, open_location


def create(place: Location, name: str, count: int) -> list[int]:
    """Try to create files 0 .. count; return those that this process created."""
    _wait_for_the_other(place, name)
    data = uuid.uuid4().hex.encode() * 1000
    return [index for index in range(count) if (place / f"object-{index}").create_exclusively(data)]


def work(place: Location, name: str, count: int) -> list[int]:
    """Publish tasks 0 .. count as long as one is free; return those that this process published."""
    owner = this_process(run=name, lane=name)
    _wait_for_the_other(place, name)
    done = []
    for index in range(count):
        folder = place / f"task-{index}"
        look = look_at(folder, run=name, max_attempts=3)
        if look.standing is Standing.FREE:
            attempt = take_lease(folder, owner, newest=look.newest)
            if attempt is not None and publish(attempt, json.dumps({"by": name}).encode()):
                done.append(index)
    return done


def point(place: Location, name: str, count: int) -> list[int]:
    """Write pointers 0 .. count into one file, each by itself."""
    _wait_for_the_other(place, name)
    for index in range(count):
        write_pointer(place, f"{name}-{index}", ArtifactKey("pairs", name, {}, {}, index))
    return list(range(count))


def hold(place: Location, name: str, count: int) -> list[int]:
    """Be the only writer of one folder `count` times, waiting for each turn; return the turns."""
    _wait_for_the_other(place, name)
    won = []
    for index in range(count):
        with hold_lease(place / "folder", patience_seconds=60):
            # Whoever finds the other's mark was not alone.
            marks = [file.name for file in (place / "folder").list() if file.name.startswith("mark-")]
            assert not marks, marks
            mark = place / "folder" / f"mark-{name}"
            mark.write_bytes(b"")
            time.sleep(0.01)
            mark.delete()
            won.append(index)
        time.sleep(0.005)
    return won


def _wait_for_the_other(place: Location, name: str) -> None:
    (place / f"ready-{name}").write_bytes(b"")
    while not all((place / f"ready-{each}").is_file() for each in ("a", "b")):
        time.sleep(0.005)


if __name__ == "__main__":
    function = {"create": create, "work": work, "point": point, "hold": hold}[sys.argv[1]]
    print(json.dumps(function(open_location(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
