"""The train function of the lane tests: tasks that take time and fail in every way, and no network."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_jobs.lanes import Interrupted, LaneWorker, Turn
from safetydpo.artifacts.attempts import publish
from safetydpo.artifacts.layout import attempt_folder
from safetydpo.artifacts.storage import open_location
from safetydpo.errors import SafetyDPOError

STATE_FILE = "state.json"


def toy_lane(settings: Mapping[str, Any]) -> str | None:
    """Count each task's steps up to its end; what `settings["faults"]` names goes wrong in its first attempts."""
    folders = [open_location(path) for path in settings["folders"]]
    worker = LaneWorker(settings, folders, resumed_file=STATE_FILE)
    # Who was there, for the tests: one file per process.
    (Path(settings["processes"]) / f"{os.getpid()}").write_text(settings["lane"]["name"])

    def count(turn: Turn) -> None:
        fault = settings["faults"].get(str(turn.index), "none")
        if fault == "bad data":
            raise SafetyDPOError("expected light, found none: switch it on")
        if fault == "always":
            raise RuntimeError("CUDA error:\nan illegal thing")
        state = attempt_folder(folders[turn.index], turn.number) / STATE_FILE
        source = turn.resume_from or state
        start = json.loads(source.read_bytes())["step"] if source.is_file() else 0
        for step in range(start, settings["steps"]):
            time.sleep(settings["seconds"])
            is_left = worker.should_leave()
            if worker.rank == 0:
                state.write_bytes(json.dumps({"step": step + 1}).encode())
            if fault == "killed once" and turn.number == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            if is_left:
                raise Interrupted
        if turn.attempt is not None:
            made = {"by": settings["lane"]["name"], "attempt": turn.number, "resumed_at": start}
            publish(turn.attempt, json.dumps({**made, "pid": os.getpid()}).encode())

    return worker.work(count)
