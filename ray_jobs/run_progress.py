"""What a command tells of its progress beside what it makes: one small object per stage in the run folder.

Whoever watches a run reads these and the stores' own records, from any machine. An object is replaced as a whole, never
read by a stage, and part of no identity. A command that finds everything closed writes none.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from ray_jobs.run import Run, run_id
from safetydpo.artifacts.attempts import MAX_TIME
from safetydpo.artifacts.layout import progress_file
from safetydpo.artifacts.records import parse_settled
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError

WRITE_SECONDS = {"local": 2.0, "remote": 10.0}
"""Between two writings of the object: on an object store each is a request that costs money."""
Standing = Literal["running", "done", "stopped", "failed"]
Moment = Annotated[float, Field(ge=0, le=MAX_TIME)]
"""Unix time in seconds."""
Count = Annotated[int, Field(ge=0, le=2**53)]
logger = logging.getLogger(__name__)


@dataclass
class Work:
    """One kind of unit that a stage makes: pictures, steps, trials."""

    label: str
    total: Count
    done: Count
    done_before: Count
    """Of `done`, those that were there when it began: they say nothing about its rate."""
    began: Moment
    ended: Moment | None = None


@dataclass(frozen=True)
class ToldExpert:
    """One expert that was open when the training began."""

    name: str
    folder: str
    """Below the store."""
    steps: Count


@dataclass
class StageProgress:
    """How far one stage is."""

    run: str
    run_id: str
    stage: str
    store: str
    config: dict[str, Any]
    """Of the command, without a secret as all configs are."""
    began: Moment
    host: str
    pid: int
    standing: Standing = "running"
    updated: Moment = 0.0
    error: str = ""
    work: list[Work] = field(default_factory=list)
    experts: list[ToldExpert] = field(default_factory=list)


class ProgressFile:
    """The object of one stage, written now and then by the command that works on it."""

    def __init__(self, run: Run, stage: str) -> None:
        self._file: Location = progress_file(run.run_dir, stage)
        self._pause = WRITE_SECONDS["local" if run.run_dir.is_local else "remote"]
        self._lock, self._has_ended, self._is_needed = threading.Lock(), threading.Event(), False
        self._state = StageProgress(
            run=run.config.name,
            run_id=run_id(run.config),
            stage=stage,
            store=run.config.execution.store,
            config=run.config.model_dump(mode="json"),
            began=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
        )

    def begin(self, label: str, *, total: int, done: int) -> Work:
        """Add work; from now on there is something to tell."""
        work = Work(label, total, done, done, time.time())
        with self._lock:
            self._state.work = [each for each in self._state.work if each.label != label or each.ended] + [work]
        self.tell()
        return work

    def tell(self) -> None:
        """Begin to tell: there is something to do."""
        self._is_needed = True
        self._write()

    def list_experts(self, experts: list[ToldExpert]) -> None:
        """Tell which experts are to be trained, and where."""
        self._state.experts = experts

    def keep_telling(self) -> None:
        """Tell again, from a thread, every so often until `end`."""
        while not self._has_ended.wait(self._pause):
            if self._is_needed:
                self._write()

    def end(self, standing: Standing, error: str = "") -> None:
        """Tell how the stage ended, if it told anything before."""
        self._has_ended.set()
        self._state.standing, self._state.error = standing, error
        if self._is_needed:
            self._write()

    def _write(self) -> None:
        with self._lock:
            self._state.updated = time.time()
            data = json.dumps(asdict(self._state), indent=1, sort_keys=True).encode() + b"\n"
            try:
                self._file.write_bytes(data)
            except (SafetyDPOError, OSError) as error:
                # For eyes only: the work itself finds out whether its storage is gone.
                logger.info("progress is not told: %s", error)


_told: ProgressFile | None = None


def told_progress() -> ProgressFile | None:
    """Return the object of the stage that this process works on; None outside of a stage."""
    return _told


@contextmanager
def telling(run: Run, stage: str) -> Iterator[None]:
    """Tell of `stage` while the block runs, and how it ended."""
    global _told
    _told = ProgressFile(run, stage)
    threading.Thread(target=_told.keep_telling, daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        _told.end("stopped")
        raise
    except BaseException as error:
        _told.end("failed", " ".join(str(error).split())[:500])
        raise
    else:
        _told.end("done")
    finally:
        _told = None


def read_progress(run_dir: Location, stage: str) -> Mapping[str, Any] | None:
    """Return what was told of a stage; None if nothing was.

    Raises:
        SafetyDPOError: if it does not parse.
    """
    file = progress_file(run_dir, stage)
    if not file.is_file():
        return None
    try:
        # A pydantic error is a ValueError, of several lines.
        return asdict(TypeAdapter(StageProgress).validate_python(parse_settled(file)))
    except ValueError as error:
        found = " ".join(str(error).split())[:300]
        raise SafetyDPOError(f"expected progress as JSON at {file}, found: {found}; delete that file") from error
