"""Fill a pool of rows with Ray Data, each wanted row exactly once, through kills, failures and repeats.

A pool is a folder of closed batches (`pool_index`), each named by a hash of its wanted ids and attempts. Rows that a
closed batch holds are never made again; a batch that was interrupted has the same wanted ids next time, hence the same
folder, and Ray Data's checkpoint resumes it. Rows that failed are wanted again by a new batch with a higher attempt,
because Ray's checkpoint counts an error row as done; the closed batches say how often a row has failed, so that a later
command tries it again too. Rows that another command is just making are waited for, not made twice. This process reads
ids and states only: pictures go from file to worker to file.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from ray_jobs.busy_time import BusyTime, note_board
from ray_jobs.deadly_rows import DeadlyRows
from ray_jobs.hand_back import HandBack
from ray_jobs.metrics import GpuGauge, count
from ray_jobs.pool_context import checkpointing
from ray_jobs.progress import progress_bar
from ray_jobs.resources import NETWORK_PASSES_PER_WORKER, workers_for
from ray_jobs.run_context import current, enter
from ray_jobs.salvage import BATCH_PREFIX, CHECKPOINT_FOLDER, salvage_open_batches
from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.layout import RECORD_FILE
from safetydpo.artifacts.leases import LeaseTaken, hold_lease, live_holder
from safetydpo.artifacts.manifest import verify_rows
from safetydpo.artifacts.pool_index import DATA_FOLDER, FILE_COLUMN, close_index, good_rows, read_index, read_rows
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import ROWS_PER_GROUP, read_table, write_table
from safetydpo.config.schema import ExecutionConfig
from safetydpo.errors import SafetyDPOError

logger = logging.getLogger(__name__)
ATTEMPTS = 3
BLOCKS_PER_WORKER = 4
MANIFEST_FILE = "manifest.parquet"
LOOK_SECONDS = 1.0
"""Between two looks at whether another command has finished its batch."""


@dataclass(frozen=True)
class Attachment:
    """Columns of another pool that a worker reads by id and file, so that they never pass through the driver."""

    pool: Location
    schema: pa.Schema
    """The columns to fetch, the id column among them."""
    id_column: str
    by: str | None = None
    """Column of the manifest that holds those ids; None = the same name."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Names that fetched columns get."""


@dataclass(frozen=True)
class PoolStage:
    """How the rows of one pool are made.

    `worker` is a class: built once per actor with `arguments`, called with manifest rows for one `output` row each.
    """

    label: str
    output: pa.Schema
    id_column: str
    worker: type
    arguments: Mapping[str, Any]
    batch_size: int
    passes_per_batch: int = NETWORK_PASSES_PER_WORKER
    """Passes through the denoiser that a batch costs, about; a small pool gets fewer actors (see `workers_for`)."""
    attach: Attachment | None = None
    """Columns that the worker's rows get from another pool; the manifest then has the `file` column of its index."""
    most_rows_per_task: int = ROWS_PER_GROUP
    """More for small rows that are made in no time, or what Ray needs for a task is what is waited for."""
    calls_per_worker: int = 1
    """Batches that a worker is called with at the same time, from as many threads; above 1 it must be made for that."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """What the rows are computed with beside the manifest, in the record of each batch; see `check_pool_inputs`."""


def fill_pool(pool: Location, manifest: pa.Table, stage: PoolStage, *, execution: ExecutionConfig) -> pa.Table:
    """Make every row of `manifest` that the pool lacks; return the index of all wanted rows, in id order.

    Rows whose status is `error` are tried up to three times by one command and then returned as they are. Rows that
    other commands are making are left to them and waited for, once everything else is made.

    Raises:
        SafetyDPOError: if rows are missing or doubled afterwards.
    """
    ids = manifest.column(stage.id_column).combine_chunks()
    tries, refused = 0, None
    while tries < ATTEMPTS:
        lacking = plan_missing(pool, manifest, stage)
        if not lacking.num_rows:
            break
        others = _batches_of_others(pool, lacking, stage.id_column)
        plan = _plan_batch(pool, others.leave(lacking, stage.id_column), stage)
        if plan is not None:
            is_new = not plan.folder.exists()
            if is_new and salvage_open_batches(pool, stage.output, id_column=stage.id_column, leave=plan.folder):
                continue
            try:
                with hold_lease(plan.folder):
                    tries += 1
                    _run_batch(plan, stage, execution=execution)
            except LeaseTaken:
                # Somebody else has begun the same batch, or even finished it, since it was planned; not twice.
                if plan.folder == refused and (plan.folder / RECORD_FILE).is_file():
                    raise
                refused = plan.folder
                time.sleep(LOOK_SECONDS)
            others = _batches_of_others(pool, lacking, stage.id_column)
        _wait_for(others, stage)
    rows = read_index(pool, stage.output, wanted=ids, id_column=stage.id_column)
    verification = verify_rows(ids, rows.column(stage.id_column))
    if not verification.is_exact:
        raise SafetyDPOError(
            f"{stage.label}: expected each of {len(ids)} rows once in {pool}, "
            f"found {len(verification.missing)} missing and {len(verification.duplicated)} doubled: "
            "run the same command again"
        )
    return rows


def plan_missing(pool: Location, manifest: pa.Table, stage: PoolStage) -> pa.Table:
    """Return the rows of a manifest of which the pool holds no good row: the anti-join of what is asked and done."""
    ids = manifest.column(stage.id_column).combine_chunks()
    have = read_index(pool, stage.output, wanted=ids, id_column=stage.id_column)
    done = have.column(stage.id_column).filter(good_rows(have))
    return manifest.filter(pc.invert(pc.is_in(ids, value_set=done.combine_chunks())))


def check_error_rate(rows: pa.Table, *, limit: float, what: str = "pictures") -> list[str]:
    """Return the ids of rows that failed for good; `what` they are stands in the error.

    Raises:
        SafetyDPOError: if their share is above `limit`; the same command tries them again.
    """
    failed = rows.filter(pc.invert(good_rows(rows))).select(["image_id", "error"]).to_pylist()
    if len(failed) > limit * rows.num_rows:
        errors = Counter(row["error"] for row in failed)
        raise SafetyDPOError(
            f"expected at most {limit:.1%} failed {what} (identity.pairs.max_error_rate), found {len(failed)} of "
            f"{rows.num_rows} after {ATTEMPTS} attempts; most frequent: {errors.most_common(1)[0][0]}: mend the cause "
            "and run the same command again"
        )
    return [row["image_id"] for row in failed]


@dataclass(frozen=True)
class _Batch:
    """The rows that one batch makes, each at its next attempt, and the folder that is named by them."""

    folder: Location
    manifest: pa.Table
    attempts: Sequence[int]


@dataclass(frozen=True)
class _Others:
    """Batches that other commands are making, and the rows of them that are wanted here."""

    batches: Sequence[Location]
    ids: pa.Array

    def leave(self, rows: pa.Table, id_column: str) -> pa.Table:
        """Return the rows that nobody is making."""
        return rows.filter(pc.invert(pc.is_in(rows.column(id_column), value_set=self.ids)))


def _batches_of_others(pool: Location, lacking: pa.Table, id_column: str) -> _Others:
    schema = pa.schema([pa.field(id_column, pa.string())])
    wanted = lacking.column(id_column).combine_chunks()
    batches, ids = [], [pa.array([], type=pa.string())]
    for batch in pool.list():
        is_open = batch.name.startswith(BATCH_PREFIX) and not (batch / RECORD_FILE).is_file()
        # One that has just been begun may have no manifest yet; its rows are then made twice, and read once.
        if not is_open or live_holder(batch) is None or not (batch / MANIFEST_FILE).is_file():
            continue
        theirs = read_table(batch / MANIFEST_FILE, schema, columns=[id_column]).column(id_column)
        ours = theirs.filter(pc.is_in(theirs, value_set=wanted)).combine_chunks()
        if len(ours):
            batches.append(batch)
            ids.append(ours)
    return _Others(batches, pa.concat_arrays(ids))


def _wait_for(others: _Others, stage: PoolStage) -> None:
    """Return when each of these batches is closed, or its maker is gone."""
    for batch in others.batches:
        is_told = False
        while (holder := live_holder(batch)) is not None and not (batch / RECORD_FILE).is_file():
            if not is_told:
                who = f"process {holder['pid']} on {holder['host']}"
                logger.warning("%s: waiting for rows that %s is making", stage.label, who)
                is_told = True
            time.sleep(LOOK_SECONDS)


def _plan_batch(pool: Location, lacking: pa.Table, stage: PoolStage) -> _Batch | None:
    if not lacking.num_rows:
        return None
    if stage.attach is not None:
        # Rows of one file come together, so that each file is opened by one task.
        lacking = lacking.take(pc.sort_indices(lacking, sort_keys=[(FILE_COLUMN.name, "ascending")]))
    failures = _count_failures(pool)
    ids = lacking.column(stage.id_column).to_pylist()
    attempts = [1 + failures[row_id] for row_id in ids]
    if "attempt" in lacking.column_names:
        column = lacking.schema.get_field_index("attempt")
        lacking = lacking.set_column(column, lacking.schema.field(column), pa.array(attempts, type=pa.int32()))
    name = f"{BATCH_PREFIX}{sha256_of(sorted(map(list, zip(ids, attempts, strict=True))))[:16]}"
    return _Batch(pool / name, lacking, attempts)


def _count_failures(pool: Location) -> Counter[str]:
    """Return how often each row failed in closed batches."""
    records = [folder / RECORD_FILE for folder in pool.list()]
    return Counter(
        row_id for file in records if file.is_file() for row_id in parse_json(file.read_bytes()).get("failed_units", [])
    )


def _run_batch(batch: _Batch, stage: PoolStage, *, execution: ExecutionConfig) -> None:
    folder, manifest = batch.folder, batch.manifest
    started = time.time()
    write_table(folder / MANIFEST_FILE, manifest)
    # The checkpoint deletes the data of commits that were under way, hence one writer at a time per folder.
    data = (folder / DATA_FOLDER).make_folder()
    resuming = checkpointing(folder, stage.id_column, execution=execution)
    with progress_bar(stage.label, total=manifest.num_rows) as board, resuming:
        _execute(batch, data, stage, execution=execution, board=board)
    found = close_index(folder, stage.output, id_column=stage.id_column)
    made = found.column(stage.id_column)
    verification = verify_rows(manifest.column(stage.id_column), made)
    if verification.unexpected or not found.num_rows:
        # Nothing here is of use, and the checkpoint would hold the next command off making it again.
        folder.delete()
        raise SafetyDPOError(
            f"{stage.label}: expected {manifest.num_rows} rows once each in {data}, found {found.num_rows}, "
            f"{len(verification.unexpected)} of them not asked for: run the same command again"
        )
    if verification.missing:
        # Seen with an object store that was killed: the checkpoint had rows whose file was never there. The batch is
        # closed with what it has, and the caller makes the rest.
        logger.warning("%s: %d rows are missing in %s, made again", stage.label, len(verification.missing), data)
    record = {
        "stage": stage.label,
        "rows": found.num_rows,
        "failed_units": made.filter(pc.invert(good_rows(found))).to_pylist(),
        "attempt": max(batch.attempts),
        "seconds": round(time.time() - started, 3),
        **({"inputs": dict(stage.inputs)} if stage.inputs else {}),
    }
    (folder / RECORD_FILE).write_bytes(json.dumps(record, indent=2, sort_keys=True).encode())
    (folder / CHECKPOINT_FOLDER).delete()


def rows_per_block(rows: int, *, batch_size: int, workers: int, most: int = ROWS_PER_GROUP) -> int:
    """Return how many rows one task makes and one file holds: whole batches, at most `most` rows or one batch.

    Few files at scale, but enough tasks for each worker to have at least four: at the end of a pool the slowest task
    is waited for, and a kill loses what is under way.
    """
    batches = -(-rows // batch_size)
    per_task = min(most // batch_size, batches // (BLOCKS_PER_WORKER * workers))
    return batch_size * max(1, per_task)


def _execute(batch: _Batch, data: Location, stage: PoolStage, *, execution: ExecutionConfig, board: Any) -> None:
    manifest, rows, again = batch.folder / MANIFEST_FILE, batch.manifest.num_rows, max(batch.attempts) > 1
    batches = -(-rows // stage.batch_size)
    workers = workers_for(execution, tasks=batches, passes_per_task=stage.passes_per_batch)
    gpus = execution.gpus_per_worker
    options: dict[str, Any] = {"num_gpus": gpus} if gpus > 0 else {"num_cpus": execution.cpus_per_worker}
    block = rows_per_block(rows, batch_size=stage.batch_size, workers=workers, most=stage.most_rows_per_task)
    arguments = {
        "worker": stage.worker,
        "arguments": dict(stage.arguments),
        "num_threads": max(1, int(execution.cpus_per_worker)),
        "board": board,
        "label": stage.label,
        "context": current().told(),
        "attach": stage.attach,
        "id_column": stage.id_column,
        "output": stage.output,
        "again": again,
        "batches_per_task": block // stage.batch_size,
    }
    # Reading a filesystem and a path, never a URI, keeps local disks and S3 on one code path.
    # One read task for the one file: it still streams, and more would only make empty ones that want a process each.
    dataset = ray.data.read_parquet(manifest.path, filesystem=manifest.filesystem, override_num_blocks=1)
    dataset = dataset.repartition(target_num_rows_per_block=block)
    dataset = dataset.map_batches(
        CountingWorker,
        fn_constructor_kwargs=arguments,
        compute=_pool_of(workers, stage),
        batch_size=stage.batch_size,
        batch_format="pyarrow",
        **options,
    )
    dataset.write_parquet(
        data.path,
        filesystem=data.filesystem,
        mode="append",
        row_group_size=ROWS_PER_GROUP,
        try_create_dir=False,
        # One writer per worker keeps up with it, and Ray keeps a process of 0.1 GB for each.
        concurrency=workers,
    )
    note_board(board, stage.label)


def _pool_of(workers: int, stage: PoolStage) -> ray.data.ActorPoolStrategy:
    """Return how many actors there are, and how many threads call the worker in each."""
    calls = stage.calls_per_worker
    if calls == 1:
        return ray.data.ActorPoolStrategy(size=workers)
    # Ray's own lock around the whole call would leave nothing to do at the same time; the worker has locks of its own.
    return ray.data.ActorPoolStrategy(
        size=workers, max_concurrent_calls_per_actor=calls, enable_true_multi_threading=True
    )


class CountingWorker:
    """Builds the stage's worker in its actor, pins its threads, calls it and reports what it finished."""

    def __init__(
        self,
        *,
        worker: Callable[..., Any],
        arguments: Mapping[str, Any],
        num_threads: int,
        board: Any,
        label: str,
        context: Mapping[str, str],
        attach: Attachment | None,
        id_column: str,
        output: pa.Schema,
        again: bool,
        batches_per_task: int,
    ) -> None:
        import torch

        enter(context)
        torch.set_num_threads(num_threads)
        self._worker = DeadlyRows(
            worker(**arguments), board=board, label=label, id_column=id_column, output=output, again=again
        )
        self._board, self._label, self._attach = board, label, attach
        self._gpu, self._busy, self._hand_back = GpuGauge(), BusyTime(), HandBack(batches_per_task)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return one output row per input row."""
        self._hand_back.before_batch()
        if self._attach is not None:
            table = attach_columns(table, self._attach)
        with self._busy:
            result = self._worker(table)
        self._board.add.remote(self._label, table.num_rows, self._busy.take())
        count("safetydpo_rows", table.num_rows, work=self._label)
        self._gpu.look()
        self._hand_back.after_batch()
        return result


def attach_columns(table: pa.Table, attach: Attachment) -> pa.Table:
    """Replace the `file` column by what those files hold of the rows it names; the order of rows stays.

    Raises:
        SafetyDPOError: if a file lacks one of the rows.
    """
    ids = table.column(attach.by or attach.id_column)
    places = pa.table({attach.id_column: ids, FILE_COLUMN.name: table.column(FILE_COLUMN.name)})
    found = read_rows(attach.pool, attach.schema, places, id_column=attach.id_column)
    position = {row_id: index for index, row_id in enumerate(found.column(attach.id_column).to_pylist())}
    missing = [row_id for row_id in ids.to_pylist() if row_id not in position]
    if missing:
        raise SafetyDPOError(
            f"expected the row {missing[0]} in {attach.pool}, where its index says it is, found it gone: "
            "delete the batch that its index names, and run the same command again"
        )
    found = found.take(pa.array([position[row_id] for row_id in ids.to_pylist()], type=pa.int64()))
    table = table.drop_columns([FILE_COLUMN.name])
    for name in attach.schema.names:
        if name != attach.id_column:
            table = table.append_column(attach.rename.get(name, name), found.column(name))
    return table
