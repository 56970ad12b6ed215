"""Fill a pool of rows with Ray Data, each wanted row exactly once, through kills, failures and repeats.

A pool is a folder of closed batches: `POOL/<hash of the wanted ids and attempts>/{manifest.parquet, data/,
record.json}`. Rows that a closed batch holds are never made again; a batch that was interrupted has the same wanted
ids next time, hence the same folder, and Ray Data's checkpoint resumes it. Rows that failed are wanted again by a
new batch with a higher attempt, because Ray's checkpoint counts an error row as done; the closed batches say how often
a row has failed, so that a later command tries it again too.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig

from ray_jobs.cluster import NETWORK_PASSES_PER_WORKER, workers_for
from ray_jobs.progress import progress_bar
from safetydpo.artifacts.layout import RECORD_FILE
from safetydpo.artifacts.manifest import verify_rows
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table, write_table
from safetydpo.config.schema import ExecutionConfig
from safetydpo.errors import SafetyDPOError

ATTEMPTS = 3
NO_PROGRESS_SECONDS = 6 * 3600


@dataclass(frozen=True)
class PoolStage:
    """How the rows of one pool are made.

    `worker` is a class: built once per actor with `arguments`, then called with a table of manifest rows and
    returning a table of `output` rows, one for each.
    """

    label: str
    output: pa.Schema
    id_column: str
    worker: type
    arguments: Mapping[str, Any]
    batch_size: int
    passes_per_batch: int = NETWORK_PASSES_PER_WORKER
    """Passes through the denoiser that a batch costs, about; a small pool gets fewer actors (see `workers_for`)."""


def read_pool(pool: Location, schema: pa.Schema, *, wanted: set[str] | None = None, id_column: str) -> pa.Table:
    """Return the rows of all closed batches that are `wanted`; the good row of a repeated id wins."""
    parts = []
    for folder in pool.list():
        if (folder / RECORD_FILE).is_file():
            part = read_table(folder / "data", schema)
            parts.append(part)
    table = pa.concat_tables(parts) if parts else schema.empty_table()
    ids = table.column(id_column).to_pylist()
    good = _good_rows(table)
    best: dict[str, int] = {}
    for index, row_id in enumerate(ids):
        if (wanted is None or row_id in wanted) and (row_id not in best or (good[index] and not good[best[row_id]])):
            best[row_id] = index
    return table.take(pa.array(sorted(best.values(), key=lambda index: str(ids[index])), type=pa.int64()))


def fill_pool(pool: Location, manifest: pa.Table, stage: PoolStage, *, execution: ExecutionConfig) -> pa.Table:
    """Make every row of `manifest` that the pool lacks; return all wanted rows, in id order.

    Rows whose status is `error` are tried up to three times by one command and then returned as they are.

    Raises:
        SafetyDPOError: if rows are missing or doubled afterwards.
    """
    ids: list[str] = manifest.column(stage.id_column).to_pylist()
    wanted = set(ids)
    for _ in range(ATTEMPTS):
        rows = read_pool(pool, stage.output, wanted=wanted, id_column=stage.id_column)
        good = _good_rows(rows)
        have = {row_id for row_id, ok in zip(rows.column(stage.id_column).to_pylist(), good, strict=True) if ok}
        lacking = [index for index, row_id in enumerate(ids) if row_id not in have]
        if not lacking:
            break
        failures = _count_failures(pool)
        attempts = [1 + failures[ids[index]] for index in lacking]
        _run_batch(
            pool, manifest.take(pa.array(lacking, type=pa.int64())), stage, execution=execution, attempts=attempts
        )
    rows = read_pool(pool, stage.output, wanted=wanted, id_column=stage.id_column)
    verification = verify_rows(ids, rows.column(stage.id_column).to_pylist())
    if not verification.is_exact:
        raise SafetyDPOError(
            f"{stage.label}: expected each of {len(ids)} rows once in {pool}, "
            f"found {len(verification.missing)} missing and {len(verification.duplicated)} doubled: "
            "run the same command again"
        )
    return rows


def check_error_rate(rows: pa.Table, *, limit: float) -> list[str]:
    """Return the ids of rows that failed for good.

    Raises:
        SafetyDPOError: if their share is above `limit`; the same command tries them again.
    """
    results = rows.select(["image_id", "status", "error"]).to_pylist()
    failed = [row for row in results if row["status"] != "ok"]
    if len(failed) > limit * rows.num_rows:
        errors = Counter(row["error"] for row in failed)
        raise SafetyDPOError(
            f"expected at most {limit:.1%} failed pictures (identity.pairs.max_error_rate), found {len(failed)} of "
            f"{rows.num_rows} after {ATTEMPTS} attempts; most frequent: {errors.most_common(1)[0][0]}: mend the cause "
            "and run the same command again"
        )
    return [row["image_id"] for row in failed]


def _good_rows(table: pa.Table) -> list[bool]:
    if "status" not in table.column_names:
        return [True] * table.num_rows
    return [status == "ok" for status in table.column("status").to_pylist()]


def _count_failures(pool: Location) -> Counter[str]:
    """Return how often each row failed in closed batches."""
    records = [folder / RECORD_FILE for folder in pool.list()]
    return Counter(
        row_id for file in records if file.is_file() for row_id in json.loads(file.read_bytes()).get("failed_units", [])
    )


def _run_batch(
    pool: Location, manifest: pa.Table, stage: PoolStage, *, execution: ExecutionConfig, attempts: Sequence[int]
) -> None:
    if "attempt" in manifest.column_names:
        column = manifest.schema.get_field_index("attempt")
        manifest = manifest.set_column(column, manifest.schema.field(column), pa.array(list(attempts), type=pa.int32()))
    ids = manifest.column(stage.id_column).to_pylist()
    folder = pool / f"batch-{sha256_of(sorted(map(list, zip(ids, attempts, strict=True))))[:16]}"
    started = time.time()
    write_table(folder / "manifest.parquet", manifest)
    # The checkpoint deletes the data of commits that were under way, hence one writer at a time per folder.
    data = (folder / "data").make_folder()
    with progress_bar(stage.label, total=manifest.num_rows) as board, _checkpointing(folder, stage.id_column):
        _execute(folder / "manifest.parquet", data, stage, execution=execution, board=board, rows=manifest.num_rows)
    found = drop_doubled(data, stage.output, id_column=stage.id_column)
    verification = verify_rows(ids, found.column(stage.id_column).to_pylist())
    if not verification.is_exact:
        raise SafetyDPOError(
            f"{stage.label}: expected {len(ids)} rows once each in {data}, found {len(verification.missing)} missing, "
            f"{len(verification.duplicated)} doubled: run the same command again"
        )
    good = _good_rows(found)
    record = {
        "stage": stage.label,
        "rows": len(ids),
        "failed_units": [i for i, ok in zip(found.column(stage.id_column).to_pylist(), good, strict=True) if not ok],
        "attempt": max(attempts),
        "seconds": round(time.time() - started, 3),
    }
    (folder / RECORD_FILE).write_bytes(json.dumps(record, indent=2, sort_keys=True).encode())
    (folder / "checkpoint").delete()


def drop_doubled(data: Location, schema: pa.Schema, *, id_column: str) -> pa.Table:
    """Keep the first row of each id, in name order of the files; return the rows that stand there now.

    A run that fails does not wait for its write tasks, and one of them may commit after the next run has looked at what
    is committed. Either row is as good as the other: both come from the same manifest row and its seed.
    """
    seen: set[str] = set()
    kept = []
    for file in [file for file in data.walk() if file.path.endswith(".parquet")]:
        table = read_table(file, schema)
        first = []
        for row_id in table.column(id_column).to_pylist():
            first.append(row_id not in seen)
            seen.add(row_id)
        if not all(first):
            table = table.filter(pa.array(first))
            if table.num_rows:
                write_table(file, table)
            else:
                file.delete()
        kept.append(table)
    return pa.concat_tables(kept) if kept else schema.empty_table()


def _execute(
    manifest: Location, data: Location, stage: PoolStage, *, execution: ExecutionConfig, board: Any, rows: int
) -> None:
    batches = -(-rows // stage.batch_size)
    workers = workers_for(execution, tasks=batches, passes_per_task=stage.passes_per_batch)
    options: dict[str, Any] = {"num_cpus": execution.cpus_per_worker}
    if execution.gpus_per_worker > 0:
        options = {"num_gpus": execution.gpus_per_worker}
    arguments = {
        "worker": stage.worker,
        "arguments": dict(stage.arguments),
        "num_threads": max(1, int(execution.cpus_per_worker)),
        "board": board,
        "label": stage.label,
    }
    # Reading a filesystem and a path, never a URI, keeps local disks and S3 on one code path.
    # One read task for the one file: it still streams, and more would only make empty ones that want a process each.
    dataset = ray.data.read_parquet(manifest.path, filesystem=manifest.filesystem, override_num_blocks=1)
    dataset = dataset.repartition(target_num_rows_per_block=stage.batch_size)
    dataset = dataset.map_batches(
        CountingWorker,
        fn_constructor_kwargs=arguments,
        compute=ray.data.ActorPoolStrategy(size=workers),
        batch_size=stage.batch_size,
        batch_format="pyarrow",
        **options,
    )
    dataset.write_parquet(data.path, filesystem=data.filesystem, mode="append", row_group_size=64, try_create_dir=False)


class CountingWorker:
    """Builds the stage's worker in its actor, pins its threads, calls it and reports what it finished."""

    def __init__(
        self, *, worker: Callable[..., Any], arguments: Mapping[str, Any], num_threads: int, board: Any, label: str
    ) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._worker = worker(**arguments)
        self._board = board
        self._label = label

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return one output row per input row."""
        result = self._worker(table)
        self._board.add.remote(self._label, table.num_rows)
        return result


@contextmanager
def _checkpointing(folder: Location, id_column: str) -> Iterator[None]:
    context = ray.data.DataContext.get_current()
    checkpoint = (folder / "checkpoint").make_folder()
    wanted = {
        "checkpoint_config": CheckpointConfig(
            id_column=id_column,
            checkpoint_path=checkpoint.path,
            delete_checkpoint_on_success=False,
            override_filesystem=checkpoint.filesystem,
        ),
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        # The second version starts an actor to read the footer of what is always one small file.
        "use_datasource_v2": False,
        "execution_no_progress_timeout_s": NO_PROGRESS_SECONDS,
        # The file system waits for an object store that is gone (artifacts/object_store.py); Ray would do it ten times.
        "retried_io_errors": [],
        # Actors that die (a lost node, out of memory) are started again; Ray's defaults give up at once.
        "retried_map_errors": True,
        "max_map_retries": 2,
    }
    before = {name: getattr(context, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def rows_of(table: pa.Table) -> Sequence[dict[str, Any]]:
    """Return the rows as dictionaries."""
    rows: Sequence[dict[str, Any]] = table.to_pylist()
    return rows
