"""Workers of the pool tests; in a module of their own, so that Ray's actors can import them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ray_jobs.layer_inputs import InputsWorker
from ray_jobs.workers import RenderWorker

INPUT = pa.schema([pa.field("row_id", pa.string()), pa.field("attempt", pa.int32())])
OUTPUT = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
    ]
)


def manifest(count: int) -> pa.Table:
    names = [f"row-{index:03d}" for index in range(count)]
    return pa.table({"row_id": names, "attempt": [1] * count}, schema=INPUT)


class LengthWorker:
    """Measures names; `row-003` fails at its first attempt, `never` always."""

    def __init__(self, never: str = "", die_once: str = "", seconds: float = 0.0) -> None:
        self._never = never
        self._die_once = die_once
        self._seconds = seconds

    def __call__(self, table: pa.Table) -> pa.Table:
        time.sleep(self._seconds)
        if self._die_once and not os.path.exists(self._die_once):
            with open(self._die_once, "w") as marker:
                marker.write("died")
            os._exit(1)
        names, attempts = table.column("row_id").to_pylist(), table.column("attempt").to_pylist()
        bad = [
            name == self._never or (name == "row-003" and attempt == 1)
            for name, attempt in zip(names, attempts, strict=True)
        ]
        return pa.table(
            {
                "row_id": names,
                "length": [len(name) for name in names],
                "status": ["error" if failed else "ok" for failed in bad],
            },
            schema=OUTPUT,
        )


class PoisonedRender(RenderWorker):
    """Draws pictures, and fails on every call that holds a prompt with the word poison."""

    def _render(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
        if any("poison" in row["prompt"] for row in rows):
            raise IndexError("this prompt cannot be drawn")
        return super()._render(rows)


class DyingInputsWorker(InputsWorker):
    """Collects layer inputs, and dies once: after the files of its second group, before it says so."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._marker = self._folder.parent / "died"
        self._calls = 0

    def __call__(self, table: pa.Table) -> pa.Table:
        made = super().__call__(table)
        self._calls += 1
        if self._calls == 2 and not self._marker.is_file():
            self._marker.write_bytes(b"died")
            os._exit(1)
        return made


class DeadlyRender(RenderWorker):
    """Draws pictures, and dies of every call that holds a prompt with the word poison, as of a crash in a library."""

    def _render(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
        if any("poison" in row["prompt"] for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._render(rows)


class MeetingWorker(LengthWorker):
    """Measures names, and says in `length` how many calls it saw at the same time; each waits a moment for a second."""

    def __init__(self, wait_seconds: float) -> None:
        super().__init__()
        self._wait_seconds = wait_seconds
        self._inside = 0
        self._threads = threading.Condition()

    def __call__(self, table: pa.Table) -> pa.Table:
        with self._threads:
            self._inside += 1
            self._threads.notify_all()
            self._threads.wait_for(lambda: self._inside > 1, timeout=self._wait_seconds)
            seen = self._inside
        made = super().__call__(table)
        time.sleep(0.05)
        with self._threads:
            self._inside -= 1
        return made.set_column(1, OUTPUT.field("length"), pa.array([seen] * table.num_rows))


class NotingWorker:
    """Measures names at a slow pace, and notes each call as it begins: when, on which node, which rows."""

    def __init__(self, folder: str, seconds: float) -> None:
        import ray

        self._file = os.path.join(folder, f"{os.getpid()}.jsonl")
        self._node, self._seconds = ray.get_runtime_context().get_node_id(), seconds

    def __call__(self, table: pa.Table) -> pa.Table:
        names = table.column("row_id").to_pylist()
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"at": time.time(), "node": self._node, "pid": os.getpid(), "rows": names}) + "\n")
        time.sleep(self._seconds)
        return pa.table(
            {"row_id": names, "length": [len(name) for name in names], "status": ["ok"] * len(names)}, schema=OUTPUT
        )
