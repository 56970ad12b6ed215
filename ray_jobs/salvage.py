"""Close what an interrupted batch has made, when the next command wants other rows and would not come back to it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from safetydpo.artifacts.layout import RECORD_FILE
from safetydpo.artifacts.leases import LeaseTaken, hold_lease, live_holder
from safetydpo.artifacts.pool_index import DATA_FOLDER, READERS, close_index, good_rows
from safetydpo.artifacts.storage import Location

CHECKPOINT_FOLDER = "checkpoint"
BATCH_PREFIX = "batch-"


def salvage_open_batches(pool: Location, schema: pa.Schema, *, id_column: str, leave: Location) -> int:
    """Close every open batch of a pool with the rows that stand there; return how many rows became usable.

    `leave` (which the next command goes on with) and batches that somebody is writing to stay as they are. A file that
    is no whole Parquet file was being written when its process died, and is deleted; a batch without a whole row too.
    """
    found = 0
    for batch in pool.list():
        closed = (batch / RECORD_FILE).is_file()
        if closed or not batch.name.startswith(BATCH_PREFIX) or batch.path == leave.path or live_holder(batch):
            continue
        # Its own command may come back to it while it is being closed, or a third one may close it first.
        with suppress(LeaseTaken), hold_lease(batch):
            found += _close(batch, schema, id_column=id_column)
    return found


def _close(batch: Location, schema: pa.Schema, *, id_column: str) -> int:
    _delete_torn_files(batch / DATA_FOLDER)
    index = close_index(batch, schema, id_column=id_column)
    if not index.num_rows:
        batch.delete()
        return 0
    record = {
        "stage": "salvaged",
        "rows": index.num_rows,
        "failed_units": index.column(id_column).filter(pc.invert(good_rows(index))).to_pylist(),
        "salvaged": True,
    }
    (batch / RECORD_FILE).write_bytes(json.dumps(record, indent=2, sort_keys=True).encode())
    (batch / CHECKPOINT_FOLDER).delete()
    return int(index.num_rows)


def _delete_torn_files(data: Location) -> None:
    with ThreadPoolExecutor(READERS) as readers:
        # Taken to the end, so that what a thread raises is raised here.
        list(readers.map(_delete_if_torn, list(data.walk())))


def _delete_if_torn(file: Location) -> None:
    try:
        with file.open_random_access() as stream:
            pq.ParquetFile(stream)
    except pa.ArrowInvalid:
        file.delete()
