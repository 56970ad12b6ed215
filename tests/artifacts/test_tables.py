from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetydpo.artifacts import tables
from safetydpo.artifacts.schemas import ADDED_LATER, IMAGES, PROMPT_PAIRS, SELECTIONS, TEXT_EMBEDDINGS
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import (
    ROWS_PER_GROUP,
    fingerprint_rows,
    fingerprint_sorted_ids,
    read_table,
    table_from_rows,
    write_table,
)
from safetydpo.errors import SafetyDPOError


def selection(index: int) -> dict[str, object]:
    return {"pair_id": f"p{index:04d}", "seed": index, "kept": index % 2 == 0, "reason": "kept"}


@pytest.fixture
def table() -> pa.Table:
    return table_from_rows([selection(index) for index in range(150)], SELECTIONS)


def test_round_trip(store: Location, table: pa.Table):
    write_table(store / "x.parquet", table)
    assert read_table(store / "x.parquet", SELECTIONS).equals(table)


def test_row_groups_are_small_and_another_reader_agrees(store: Location, table: pa.Table):
    """150 rows in groups of 64: 64 + 64 + 22."""
    write_table(store / "x.parquet", table)
    path = (store / "x.parquet").local_path
    groups = pq.ParquetFile(path).metadata
    assert [groups.row_group(index).num_rows for index in range(groups.num_row_groups)] == [ROWS_PER_GROUP] * 2 + [22]
    assert pd.read_parquet(path).to_dict("records") == table.to_pylist()


def test_equal_tables_have_equal_bytes(store: Location, table: pa.Table):
    write_table(store / "a.parquet", table)
    write_table(store / "b.parquet", table_from_rows(table.to_pylist(), SELECTIONS))
    assert (store / "a.parquet").read_bytes() == (store / "b.parquet").read_bytes()


def test_a_folder_is_read_in_name_order_without_other_files(store: Location, table: pa.Table):
    write_table(store / "part-2.parquet", table.slice(100))
    write_table(store / "part-1.parquet", table.slice(0, 100))
    (store / "notes.txt").write_bytes(b"not a table")
    (store / ".part-3.parquet.tmp").write_bytes(b"half")
    assert read_table(store, SELECTIONS).equals(table)


def test_an_empty_folder_is_an_empty_table(store: Location):
    found = read_table(store.make_folder(), SELECTIONS)
    assert (found.num_rows, found.schema) == (0, SELECTIONS)


def test_chosen_columns_come_in_the_order_asked(store: Location, table: pa.Table):
    write_table(store / "x.parquet", table)
    found = read_table(store / "x.parquet", SELECTIONS, columns=["kept", "pair_id"])
    assert found.schema.names == ["kept", "pair_id"]
    assert found.column("pair_id").to_pylist() == table.column("pair_id").to_pylist()


def test_columns_in_another_order_and_more_of_them_are_no_harm(store: Location, table: pa.Table):
    other = table.select(["reason", "kept", "seed", "pair_id"]).append_column("extra", pa.array(range(150)))
    write_table(store / "x.parquet", other)
    assert read_table(store / "x.parquet", SELECTIONS).equals(table)


def test_a_picture_may_be_missing_but_not_its_id():
    row = {"image_id": "i", "image": None, "sha256": "", "status": "error", "error": "e", "attempt": 1}
    row |= {"width": 0, "height": 0, "format": ""}
    assert table_from_rows([row], IMAGES).column("image").to_pylist() == [None]
    with pytest.raises(SafetyDPOError, match="expected a value of 'image_id' in every row, found a row without"):
        table_from_rows([row, row | {"image_id": None}], IMAGES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "x"}, r"expected rows of columns \['pair_id', .*\], found: Could not convert 'x'"),
        ({"seed": 2**70}, "found: .*(too large|overflow)"),
        ({"pair_id": 3.5}, "found: Expected bytes, got a 'float' object"),
        ({"pair_id": "\ud800"}, "found: 'utf-8' codec can't encode"),
        ({"sead": 3}, "found another: 'sead'"),
    ],
)
def test_rows_that_do_not_fit(change: dict[str, object], message: str):
    with pytest.raises(SafetyDPOError, match=message) as caught:
        table_from_rows([selection(0), selection(1) | change], SELECTIONS)
    assert "\n" not in str(caught.value)


def test_a_row_that_lacks_a_column():
    with pytest.raises(SafetyDPOError, match="expected a value of 'safe_text' in every row, found a row without"):
        table_from_rows([{"pair_id": "p", "unsafe_text": "u"}], PROMPT_PAIRS)


def test_a_missing_file(store: Location):
    with pytest.raises(SafetyDPOError, match=r"expected a file at .*x\.parquet, found nothing: run the stage"):
        read_table(store / "x.parquet", SELECTIONS)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file(store: Location, table: pa.Table, share: float):
    write_table(store / "x.parquet", table)
    data = (store / "x.parquet").read_bytes()
    (store / "x.parquet").write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        SafetyDPOError,
        match=r"expected a complete Parquet file at .*x\.parquet, found [\d,]+ bytes that do not parse \(.*\): "
        "write it again",
    ) as caught:
        read_table(store / "x.parquet", SELECTIONS)
    assert "\n" not in str(caught.value)


def test_one_truncated_file_of_a_folder_is_named(store: Location, table: pa.Table):
    write_table(store / "a.parquet", table)
    (store / "b.parquet").write_bytes((store / "a.parquet").read_bytes()[:-9])
    with pytest.raises(SafetyDPOError, match=r"expected a complete Parquet file at .*b\.parquet"):
        read_table(store, SELECTIONS)


def test_a_file_of_another_table(store: Location, table: pa.Table):
    write_table(store / "x.parquet", table)
    with pytest.raises(SafetyDPOError, match=r"expected columns \['pair_id', .*\] in .*, found no 'unsafe_text'"):
        read_table(store / "x.parquet", PROMPT_PAIRS)


@pytest.mark.parametrize(
    ("column", "values"), [("seed", ["many"]), ("kept", ["maybe"]), ("reason", [[1]]), ("seed", [None])]
)
def test_a_column_of_another_type(store: Location, column: str, values: list[object]):
    content = {"pair_id": ["p"], "seed": [1], "kept": [True], "reason": ["kept"]} | {column: values}
    write_table(store / "x.parquet", pa.table(content))
    with pytest.raises(SafetyDPOError, match=r"expected a complete Parquet file at .*x\.parquet, found"):
        read_table(store / "x.parquet", SELECTIONS)


def test_writing_fails_whole(store: Location, table: pa.Table):
    (store / "a").write_bytes(b"")
    with pytest.raises(SafetyDPOError, match=r"expected to write .* bytes to .*x\.parquet"):
        write_table(store / "a" / "x.parquet", table)
    assert [path.name for path in Path(store.path).iterdir()] == ["a"]


def test_fingerprint_by_hand():
    """sha256 over the lines "a 2", "b 1": sorted by id, one space, a line feed after each."""
    assert fingerprint_rows([("b", "1"), ("a", "2")]) == hashlib.sha256(b"a 2\nb 1\n").hexdigest()
    assert fingerprint_rows([]) == hashlib.sha256(b"").hexdigest()


rows = st.lists(st.tuples(st.text("abc", min_size=1, max_size=3), st.text("0123", max_size=3)), max_size=6)


@given(rows, st.randoms())
def test_fingerprint_ignores_order(pairs: list[tuple[str, str]], random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert fingerprint_rows(iter(shuffled)) == fingerprint_rows(pairs)


@settings(max_examples=50)
@given(rows, rows)
def test_fingerprint_tells_other_rows_apart(one: list[tuple[str, str]], two: list[tuple[str, str]]):
    assert (fingerprint_rows(one) == fingerprint_rows(two)) == (sorted(one) == sorted(two))


def test_fingerprint_is_the_same_for_every_permutation():
    pairs = [("a", "1"), ("b", "2"), ("c", "3")]
    assert len({fingerprint_rows(order) for order in itertools.permutations(pairs)}) == 1


def test_a_stream_makes_the_same_table_as_a_list(monkeypatch: pytest.MonkeyPatch):
    rows = [{"image_id": f"{index}", "judge": "j"} for index in range(7)]
    schema = pa.schema([pa.field("image_id", pa.string(), nullable=False), pa.field("judge", pa.string())])
    monkeypatch.setattr(tables, "ROWS_PER_CHUNK", 3)
    table = tables.table_from_stream(iter(rows), schema)
    assert table.column("image_id").num_chunks == 3
    assert table.equals(table_from_rows(rows, schema))
    assert tables.table_from_stream([], schema).equals(schema.empty_table())


def test_a_column_added_later_that_an_older_file_lacks_is_null(store: Location):
    old = pa.schema([pa.field("image_id", pa.string(), nullable=False)])
    new = old.append(pa.field("micro_batch", pa.int32(), nullable=True, metadata=ADDED_LATER))
    write_table(store / "old.parquet", table_from_rows([{"image_id": "a"}], old))
    for columns in (None, ["image_id", "micro_batch"]):
        assert read_table(store / "old.parquet", new, columns=columns).to_pylist() == [
            {"image_id": "a", "micro_batch": None}
        ]
    with pytest.raises(SafetyDPOError, match="found no 'micro_batch'"):
        read_table(store / "old.parquet", old.append(pa.field("micro_batch", pa.int32(), nullable=True)))


def test_some_columns_of_a_truncated_file_are_refused_too(store: Location):
    schema = pa.schema([pa.field("image_id", pa.string(), nullable=False)])
    write_table(store / "t.parquet", table_from_rows([{"image_id": "a"}], schema))
    (store / "t.parquet").write_bytes((store / "t.parquet").read_bytes()[:-9])
    with pytest.raises(SafetyDPOError, match=r"expected a complete Parquet file at .*, found \d+ bytes"):
        read_table(store / "t.parquet", schema, columns=["image_id"])


def test_text_features_of_earlier_versions_read_without_pooled_ones(store: Location):
    """A pool may hold files from before and after the columns came."""
    row = {"caption_sha256": "a", "embedding": b"1234", "tokens": 1, "width": 2}
    old = pa.schema([field for field in TEXT_EMBEDDINGS if field.metadata != ADDED_LATER])
    write_table(store / "pool" / "1.parquet", table_from_rows([row], old))
    new = row | {"caption_sha256": "b", "pooled": b"56", "pooled_width": 1}
    write_table(store / "pool" / "2.parquet", table_from_rows([new], TEXT_EMBEDDINGS))
    found = read_table(store / "pool", TEXT_EMBEDDINGS)
    assert found.schema.equals(TEXT_EMBEDDINGS)
    assert found.to_pylist() == [row | {"pooled": None, "pooled_width": None}, new]
    chosen = read_table(store / "pool" / "1.parquet", TEXT_EMBEDDINGS, columns=["pooled_width", "tokens"])
    assert chosen.to_pylist() == [{"pooled_width": None, "tokens": 1}]


@given(st.sets(st.text("abcdef0123456789", min_size=1, max_size=4)))
def test_fingerprint_of_sorted_ids_is_that_of_rows_without_content(ids: set[str]) -> None:
    assert fingerprint_sorted_ids(sorted(ids)) == fingerprint_rows((row_id, "") for row_id in ids)
