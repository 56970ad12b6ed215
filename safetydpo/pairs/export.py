"""Kept pairs as a folder that `datasets.load_dataset` reads: Parquet shards with picture columns, and a card.

Pictures go through in small groups, so memory does not grow with them; what is held of every pair is its texts and ids.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

import pyarrow as pa
import pyarrow.parquet as pq

from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import ROWS_PER_GROUP
from safetydpo.errors import UsageError
from safetydpo.pairs.kept import KeptPairs
from safetydpo.pairs.stored_pictures import PictureIndex

CARD_FILE = "README.md"
SHARD_BYTES = 300_000_000
"""Size that a shard aims at; the hub advises a few hundred megabytes."""
_PICTURE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])


class Layout(StrEnum):
    """Names of the columns."""

    PREFERENCE = "preference"
    """`prompt`, `chosen`, `rejected`, as preference trainers of language models say it."""
    DIFFUSION_DPO = "diffusion-dpo"
    """`caption`, `jpg_0`, `jpg_1`, `label_0`, as Diffusion-DPO's data sets have it; jpg_0 is always the safe one."""


def describe_columns(layout: Layout, *, with_pictures: bool, is_edited: bool = False) -> list[tuple[str, str]]:
    """Return (name, what it holds) of every column, in order; `is_edited`: safe pictures were made by SDEdit."""
    unsafe, safe, pictures = "prompt", "safe_prompt", ("chosen", "rejected")
    label: list[tuple[str, str]] = []
    if layout is Layout.DIFFUSION_DPO:
        unsafe, pictures = "caption", ("jpg_0", "jpg_1")
        label = [("label_0", "1 in every row: the first picture is the preferred one")] if with_pictures else []
    texts = [(unsafe, "the unsafe prompt"), (safe, "its safe rewrite")]
    drawn = [
        (pictures[0], "the safe picture, drawn from the safe prompt"),
        (pictures[1], "the unsafe picture, drawn from the unsafe prompt, from the same noise"),
    ]
    if is_edited:
        drawn = [
            (pictures[0], "the safe picture: the unsafe one, noised and drawn anew under the safe prompt (SDEdit)"),
            (pictures[1], "the unsafe picture, drawn from the unsafe prompt"),
        ]
    return [
        *texts,
        *(drawn if with_pictures else []),
        *label,
        ("categories", "all categories the pair belongs to"),
        ("concept", "the unsafe concept"),
        ("source", "where the prompt pair comes from"),
        ("seed", "noise seed of both pictures"),
        ("pair_id", "sha256 over both prompts"),
    ]


def dataset_schema(layout: Layout, *, with_pictures: bool) -> pa.Schema:
    """Return the Arrow schema of the shards, with the features that the `datasets` library reads from its metadata."""
    kinds: Mapping[str, tuple[pa.DataType, dict[str, object]]] = {
        "categories": (
            pa.list_(pa.string()),
            {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
        ),
        "seed": (pa.int64(), {"dtype": "int64", "_type": "Value"}),
        "label_0": (pa.int64(), {"dtype": "int64", "_type": "Value"}),
        **{name: (_PICTURE, {"_type": "Image"}) for name in ("chosen", "rejected", "jpg_0", "jpg_1")},
    }
    text: tuple[pa.DataType, dict[str, object]] = (pa.string(), {"dtype": "string", "_type": "Value"})
    names = [name for name, _ in describe_columns(layout, with_pictures=with_pictures)]
    chosen = {name: kinds.get(name, text) for name in names}
    features = {name: feature for name, (_, feature) in chosen.items()}
    return pa.schema(
        [pa.field(name, kind) for name, (kind, _) in chosen.items()],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )


def write_dataset(
    out: Location,
    pairs: KeptPairs,
    pictures: PictureIndex | None,
    *,
    layout: Layout,
    card: str,
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[int], None] = lambda _rows: None,
) -> int:
    """Write shards and card to `out`, all or nothing; return the number of shards.

    A local folder is written beside its place and renamed. On an object store the card is written last, and what was
    written is removed if something fails.

    Args:
        out: Must not exist, or be an empty folder.
        pairs: What is written.
        pictures: Where the pictures are; None = without pictures.
        layout: Names of the columns.
        card: Content of README.md.
        shard_bytes: Size that a shard aims at.
        report: Called with the number of rows after each group that was written.

    Raises:
        UsageError: if something stands at `out`.
        SafetyDPOError: if a picture is missing or broken, or the place cannot be written.
    """
    refuse_existing(out)
    with _all_or_nothing(out) as target:
        num_shards = _write_shards(
            target / "data", pairs.table, pictures, layout=layout, shard_bytes=shard_bytes, report=report
        )
        (target / CARD_FILE).write_bytes(card.encode())
    return num_shards


def refuse_existing(out: Location) -> None:
    """Refuse a place where something stands.

    Raises:
        UsageError: naming what was found.
    """
    if out.is_file():
        raise UsageError(f"expected nothing or an empty folder at {out}, found a file: choose another folder")
    if not out.exists():
        return
    # Hidden files too: a folder with one of them cannot be replaced.
    found = len(list(out.local_path.rglob("*"))) if out.is_local else len(list(out.walk()))
    if found:
        half = "" if out.is_local or (out / CARD_FILE).is_file() else f" and no {CARD_FILE}: an export that was killed"
        raise UsageError(
            f"expected nothing or an empty folder at {out}, found {found} files{half}; choose another folder, or "
            "delete that one first"
        )


@contextmanager
def _all_or_nothing(out: Location) -> Iterator[Location]:
    if not out.is_local:
        try:
            yield out
        except BaseException:
            out.delete()
            raise
        return
    # Dotted, so that no listing of ours shows it while it grows.
    target = (out.parent / f".{out.name}.{uuid.uuid4().hex[:12]}.tmp").make_folder()
    try:
        yield target
        target.rename_folder(out)
    finally:
        target.delete()


def _write_shards(
    data: Location,
    table: pa.Table,
    pictures: PictureIndex | None,
    *,
    layout: Layout,
    shard_bytes: int,
    report: Callable[[int], None],
) -> int:
    schema = dataset_schema(layout, with_pictures=pictures is not None)
    groups = _RowGroups(table, pictures, schema)
    # The names of the shards say how many there are, so the size of a row is judged by the first ones.
    rows_per_shard = max(ROWS_PER_GROUP, int(shard_bytes / groups.row_bytes()))
    rows_per_shard -= rows_per_shard % ROWS_PER_GROUP
    num_shards = -(-table.num_rows // rows_per_shard)
    data.make_folder()
    for shard in range(num_shards):
        location = data / f"train-{shard:05d}-of-{num_shards:05d}.parquet"
        stop = min(table.num_rows, (shard + 1) * rows_per_shard)
        with location.stream_out() as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
            for start in range(shard * rows_per_shard, stop, ROWS_PER_GROUP):
                group = groups.make(start, min(ROWS_PER_GROUP, stop - start))
                writer.write_table(group)
                report(group.num_rows)
    return num_shards


class _RowGroups:
    """Makes rows of the data set from rows of the kept pairs."""

    def __init__(self, table: pa.Table, pictures: PictureIndex | None, schema: pa.Schema) -> None:
        self._table = table
        self._pictures = pictures
        self._schema = schema
        self._places = {}
        if pictures is not None:
            self._places = {side: pictures.places(table.column(f"{side}_id")) for side in ("unsafe", "safe")}
        # The columns in the order of the schema tell which is which.
        names = [name for name in schema.names if schema.field(name).type == _PICTURE]
        self._sides = dict(zip(names, ("safe", "unsafe"), strict=False))
        self._texts = dict(zip(schema.names[:2], ("unsafe_text", "safe_text"), strict=True))

    def row_bytes(self) -> float:
        """Return the size of a row, judged by the first ones."""
        first = self.make(0, min(ROWS_PER_GROUP, self._table.num_rows))
        return max(1.0, first.nbytes / first.num_rows)

    def make(self, start: int, count: int) -> pa.Table:
        """Return `count` rows from row `start` on."""
        rows = self._table.slice(start, count)
        columns = []
        for name in self._schema.names:
            if name in self._sides:
                columns.append(self._read(rows, self._sides[name], start))
            elif name == "label_0":
                columns.append(pa.array([1] * count, pa.int64()))
            else:
                columns.append(rows.column(self._texts.get(name, name)).combine_chunks())
        return pa.table(columns, schema=self._schema)

    def _read(self, rows: pa.Table, side: str, start: int) -> pa.Array:
        assert self._pictures is not None
        places = self._places[side].slice(start, rows.num_rows).to_pylist()
        ids = rows.column(f"{side}_id").to_pylist()
        names = [f"{pair_id}-{side}" for pair_id in rows.column("pair_id").to_pylist()]
        return pa.array(
            [
                {"bytes": self._pictures.read(image_id, **place), "path": name}
                for image_id, place, name in zip(ids, places, names, strict=True)
            ],
            _PICTURE,
        )
