from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import ray.data

from ray_jobs.pools import PoolStage, check_error_rate, fill_pool
from safetydpo.artifacts.pool_index import drop_doubled, read_pool
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table, table_from_rows, write_table
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError

ROWS = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("value", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
    ]
)
WANTED = pa.schema([pa.field("row_id", pa.string(), nullable=False), pa.field("attempt", pa.int32(), nullable=False)])


class Squares:
    """Squares the number in the id; ids with `late` fail at the first attempt, ids with `never` always."""

    def __init__(self, log: str, lose: str = "", lose_once: str = "") -> None:
        self._log = Path(log)
        # A row that is lost once is lost while it comes with others.
        self._lose, self._lose_once = lose, lose_once

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = []
        for row in table.to_pylist():
            (self._log / f"{row['row_id']}.{row['attempt']}").touch()
            good = not ("never" in row["row_id"] or ("late" in row["row_id"] and row["attempt"] == 1))
            number = int(row["row_id"][1:4])
            rows.append({"row_id": row["row_id"], "value": number * number, "status": "ok" if good else "error"})
        lost = {self._lose, self._lose_once if len(rows) > 1 else ""}
        return table_from_rows([row for row in rows if row["row_id"] not in lost], ROWS)


def manifest_of(ids: list[str]) -> pa.Table:
    return table_from_rows([{"row_id": row_id, "attempt": 1} for row_id in ids], WANTED)


def stage_of(log: Path, **arguments: str) -> PoolStage:
    log.mkdir(exist_ok=True)
    return PoolStage("squares", ROWS, "row_id", Squares, {"log": str(log), **arguments}, batch_size=4)


def close(folder: Location, *rows: tuple[str, int, str]) -> None:
    table = [dict(zip(ROWS.names, row, strict=True)) for row in rows]
    write_table(folder / "data" / "part.parquet", table_from_rows(table, ROWS))
    (folder / "record.json").write_bytes(b"{}")


def test_reading_takes_closed_batches_the_good_row_and_id_order(store: Location):
    close(store / "batch-1", ("b", 1, "error"), ("c", 2, "ok"), ("d", 3, "error"))
    close(store / "batch-2", ("a", 4, "ok"), ("b", 5, "ok"), ("c", 6, "error"))
    write_table(store / "batch-3" / "data" / "part.parquet", table_from_rows([], ROWS))
    (store / "batch-4" / "data" / "part.parquet").write_bytes(b"open and broken: not looked at")
    found = read_pool(store, ROWS, id_column="row_id")
    assert [tuple(row.values()) for row in found.to_pylist()] == [
        ("a", 4, "ok"),
        ("b", 5, "ok"),
        ("c", 2, "ok"),
        ("d", 3, "error"),
    ]
    assert read_pool(store, ROWS, wanted={"b"}, id_column="row_id").column("value").to_pylist() == [5]


def write_rows(location: Location, ids: str, value: int) -> None:
    rows = [{"row_id": row_id, "value": value, "status": "ok"} for row_id in ids]
    write_table(location, table_from_rows(rows, ROWS))


def test_rows_that_two_runs_wrote_are_kept_once(store: Location):
    """abcd, then cdeef, then ab again: the second file keeps ef, the third goes, the first is not touched."""
    for name, ids in (("1", "abcd"), ("2", "cdeef"), ("3", "ab")):
        write_rows(store / f"{name}.parquet", ids, int(name))
    first = (store / "1.parquet").read_bytes()
    kept = drop_doubled(store, ROWS, id_column="row_id")
    assert kept.column("row_id").to_pylist() == list("abcdef")
    assert kept.column("value").to_pylist() == [1, 1, 1, 1, 2, 2]
    assert read_table(store, ROWS).equals(kept.select(ROWS.names))
    assert kept.column("file").to_pylist() == [f"{store.parent.name}/{store.name}/{n}.parquet" for n in "111122"]
    assert (store / "1.parquet").read_bytes() == first
    assert not (store / "3.parquet").exists()
    assert drop_doubled(store, ROWS, id_column="row_id").equals(kept)
    assert drop_doubled(store / "none", ROWS, id_column="row_id").num_rows == 0


def test_an_absent_pool_is_empty(store: Location):
    assert read_pool(store, ROWS, id_column="row_id").num_rows == 0


@pytest.mark.slow
def test_fill_then_add_then_nothing(cluster: None, small: Config, store: Location, tmp_path: Path):
    """10 rows, then 3 more: the second call makes the 3 only, the third none. Failed rows are tried three times."""
    stage = stage_of(tmp_path / "log")
    ids = [f"r{index:03d}" for index in range(8)] + ["r008late", "r009never"]
    context = ray.data.DataContext.get_current()
    before = (context.checkpoint_config, context.max_map_retries, context.enable_progress_bars)
    found = fill_pool(store, manifest_of(ids), stage, execution=small.execution)
    assert (context.checkpoint_config, context.max_map_retries, context.enable_progress_bars) == before
    assert found.column("row_id").to_pylist() == ids
    assert found.column("value").to_pylist() == [index * index for index in range(10)]
    assert found.column("status").to_pylist() == ["ok"] * 9 + ["error"]
    made = sorted(path.name for path in (tmp_path / "log").iterdir())
    assert made == sorted(
        [f"{row_id}.1" for row_id in ids] + ["r008late.2", "r009never.2", "r009never.3"],
    )
    records = [json.loads((folder / "record.json").read_bytes()) for folder in store.list()]
    assert sorted((record["attempt"], record["rows"]) for record in records) == [(1, 10), (2, 2), (3, 1)]
    assert not any((folder / "checkpoint").exists() for folder in store.list())

    good = [row_id for row_id in ids if row_id != "r009never"]
    again = stage_of(tmp_path / "again")
    fill_pool(store, manifest_of(good), again, execution=small.execution)
    assert list((tmp_path / "again").iterdir()) == []
    more = fill_pool(store, manifest_of([*good, "r010", "r011", "r012"]), again, execution=small.execution)
    assert more.num_rows == 12
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["r010.1", "r011.1", "r012.1"]


@pytest.mark.slow
def test_a_later_command_tries_failed_rows_again(cluster: None, small: Config, store: Location, tmp_path: Path):
    """Attempts 1 to 3 by the first command, 4 to 6 by the second; the good row is made once."""
    stage = stage_of(tmp_path / "log")
    for _ in range(2):
        found = fill_pool(store, manifest_of(["r000", "r009never"]), stage, execution=small.execution)
        assert found.column("status").to_pylist() == ["ok", "error"]
    made = sorted(path.name for path in (tmp_path / "log").iterdir())
    assert made == ["r000.1", *(f"r009never.{attempt}" for attempt in range(1, 7))]


@pytest.mark.slow
def test_a_row_that_was_lost_once_is_made_by_the_same_command(
    cluster: None, small: Config, store: Location, tmp_path: Path
):
    stage = stage_of(tmp_path / "log", lose_once="r002")
    ids = [f"r{index:03d}" for index in range(5)]
    found = fill_pool(store, manifest_of(ids), stage, execution=small.execution)
    assert found.column("row_id").to_pylist() == ids
    assert sorted(json.loads((folder / "record.json").read_bytes())["rows"] for folder in store.list()) == [1, 4]


@pytest.mark.slow
def test_a_lost_row_is_made_again_and_stops_the_stage_in_the_end(
    cluster: None, small: Config, store: Location, tmp_path: Path
):
    """r002 never arrives: the others are closed and kept; asked for alone, nothing comes, and that is an error."""
    stage = stage_of(tmp_path / "log", lose="r002")
    with pytest.raises(
        SafetyDPOError, match="squares: expected 1 rows once each in .*, found 0, 0 of them not asked for: run"
    ):
        fill_pool(store, manifest_of([f"r{index:03d}" for index in range(5)]), stage, execution=small.execution)
    assert [json.loads((folder / "record.json").read_bytes())["rows"] for folder in store.list()] == [4]
    assert read_pool(store, ROWS, id_column="row_id").num_rows == 4


def test_a_failed_picture_is_listed_and_many_stop_the_stage():
    """1 of 100 rows is at a limit of 1 %; 2 of 100 are above it, and the most frequent reason is named."""
    ids = [f"{index:03d}" for index in range(100)]

    def rows(failed: int) -> pa.Table:
        status = ["error"] * failed + ["ok"] * (100 - failed)
        return pa.table({"image_id": ids, "status": status, "error": ["no memory"] * failed + [""] * (100 - failed)})

    assert check_error_rate(rows(0), limit=0.01) == []
    assert check_error_rate(rows(1), limit=0.01) == ["000"]
    with pytest.raises(SafetyDPOError, match=r"at most 1.0% failed .* found 2 of 100 after 3 attempts; .*: no memory"):
        check_error_rate(rows(2), limit=0.01)
