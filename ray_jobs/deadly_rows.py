"""Rows that end their worker's process: a crash in a library, memory that no smaller batch frees.

Ray Data starts an actor that died again and gives it the same rows, without end. So each call tells the progress board
what it begins, and what it has ended. Rows that were begun and not ended twice are made one by one; one that has then
ended its process twice is not made again by this command: it becomes an error row. A process that ends for another
reason, as with its node, costs its rows one of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import ray

from ray_jobs.workers import Made
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.errors import SafetyDPOError

DEATHS = 2


class DeadlyRows:
    """Calls a worker, with fewer rows at a time where processes have died of them.

    A worker's `error_row(row, error)`, if it has one, makes the row of what cannot be made. `again` says that rows
    have failed before.
    """

    def __init__(
        self, worker: Any, *, board: Any, label: str, id_column: str, output: pa.Schema, again: bool = False
    ) -> None:
        self._worker, self._board, self._label = worker, board, label
        self._id_column, self._output = id_column, output
        # The first process of an actor does not wait to be told that nothing has happened: that would cost every batch
        # a way to the board and back. A crash before its message is out costs one more.
        self._waits = again or ray.get_runtime_context().was_current_actor_reconstructed

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return one output row per row."""
        ids = [str(row_id) for row_id in table.column(self._id_column).to_pylist()]
        if len(ids) == 1:
            return self._one(table, ids[0])
        batch = f"{ids[0]} and {len(ids) - 1} more"
        if self._begin(batch) < DEATHS:
            made = self._worker(table)
        else:
            made = pa.concat_tables([self._one(table.slice(place, 1), row_id) for place, row_id in enumerate(ids)])
        self._end(batch)
        return made

    def _one(self, table: pa.Table, row_id: str) -> pa.Table:
        if self._begin(row_id) >= DEATHS:
            # Not told as ended: a later attempt of the same command would only die of it again.
            return self._failed(table.to_pylist()[0], row_id)
        made = self._worker(table)
        self._end(row_id)
        return made

    def _failed(self, row: Mapping[str, Any], row_id: str) -> pa.Table:
        error = SafetyDPOError(
            f"its worker's process ended {DEATHS} times while it made this row alone (out of memory, or a crash)"
        )
        if not hasattr(self._worker, "error_row"):
            raise SafetyDPOError(
                f"{self._label}: expected a row for {row_id}, found that {error}: give workers more memory, or leave "
                "it out"
            )
        failed: Made = self._worker.error_row(row, error)
        return table_from_rows([failed], self._output)

    def _begin(self, what: str) -> int:
        """Return how often this was begun and not ended before."""
        answer = self._board.begin.remote(self._label, what)
        return int(ray.get(answer)) if self._waits else 0

    def _end(self, what: str) -> None:
        self._board.end.remote(self._label, what)
