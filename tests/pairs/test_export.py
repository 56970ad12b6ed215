"""Exported folders are read by the `datasets` library itself."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.pairs.export import Layout, dataset_schema, describe_columns, refuse_existing, write_dataset
from safetydpo.pairs.kept import read_kept_pairs
from safetydpo.pairs.stored_pictures import PictureIndex
from tests.pairs.stored_pairs import MadePair, close_batch, close_pairs, failed_row, image_row, picture

PAIRS = [
    MadePair(1, "thorn"),
    MadePair(2, "moss", ("hate", "violence")),
    MadePair(3, "thorn", kept=False, reason="safe picture is not safe"),
    MadePair(4, "moss", ("hate",)),
]
KEPT = sorted((pair for pair in PAIRS if pair.kept), key=lambda pair: (pair.concept, pair.pair_id))


@pytest.fixture
def folder(store: Location) -> Location:
    """A closed pairs artifact and its pictures; one of them failed first and was drawn by a later batch."""
    late = PAIRS[0]
    rows = [image_row(pair, side) for pair in PAIRS for side in ("unsafe", "safe") if (pair, side) != (late, "safe")]
    close_batch(store, "batch-1", [*rows, failed_row(late, "safe")], files=3)
    close_batch(store, "batch-2", [image_row(late, "safe")])
    return close_pairs(store, PAIRS)[0]


def write(store: Location, folder: Location, out: Location, layout: Layout = Layout.PREFERENCE, **options: Any) -> int:
    """Write with pictures and a card of one line."""
    return write_dataset(
        out,
        read_kept_pairs(folder),
        PictureIndex(store / "images" / "pool-1"),
        layout=layout,
        card="a card\n",
        **options,
    )


def load(out: Location, cache: Path) -> Any:
    """What somebody else's training reads."""
    import datasets

    return datasets.load_dataset(out.path, split="train", cache_dir=str(cache))


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_the_library_reads_texts_and_decoded_pictures(store: Location, folder: Location, tmp_path: Path):
    out = open_location(str(tmp_path / "out"))
    assert write(store, folder, out) == 1
    rows = load(out, tmp_path / "cache")
    assert rows.column_names == [name for name, _ in describe_columns(Layout.PREFERENCE, with_pictures=True)]
    assert len(rows) == len(KEPT)
    for row, pair in zip(rows, KEPT, strict=True):
        assert (row["prompt"], row["safe_prompt"]) == pair.texts
        assert (row["categories"], row["concept"], row["source"]) == (list(pair.categories), pair.concept, "by hand")
        assert (row["seed"], row["pair_id"]) == (pair.number, pair.pair_id)
        for column, side in (("chosen", "safe"), ("rejected", "unsafe")):
            assert isinstance(row[column], Image.Image)
            assert (np.asarray(row[column]) == pixels(picture(pair, side))).all()


def test_the_layout_of_diffusion_dpo(store: Location, folder: Location, tmp_path: Path):
    out = open_location(str(tmp_path / "out"))
    write(store, folder, out, Layout.DIFFUSION_DPO)
    rows = load(out, tmp_path / "cache")
    assert rows.column_names[:5] == ["caption", "safe_prompt", "jpg_0", "jpg_1", "label_0"]
    for row, pair in zip(rows, KEPT, strict=True):
        assert (row["caption"], row["label_0"]) == (pair.texts[0], 1)
        assert (np.asarray(row["jpg_0"]) == pixels(picture(pair, "safe"))).all()
        assert (np.asarray(row["jpg_1"]) == pixels(picture(pair, "unsafe"))).all()


@pytest.mark.parametrize("layout", list(Layout))
def test_without_pictures_none_is_read(folder: Location, tmp_path: Path, layout: Layout):
    out = open_location(str(tmp_path / "out"))
    write_dataset(out, read_kept_pairs(folder), None, layout=layout, card="")
    rows = load(out, tmp_path / "cache")
    assert rows.column_names == [name for name, _ in describe_columns(layout, with_pictures=False)]
    assert not {"chosen", "rejected", "jpg_0", "jpg_1", "label_0"} & set(rows.column_names)
    assert rows["pair_id"][:] == [pair.pair_id for pair in KEPT]


@pytest.mark.parametrize("with_pictures", [True, False])
@pytest.mark.parametrize("layout", list(Layout))
def test_the_features_are_those_that_the_library_would_write(layout: Layout, with_pictures: bool):
    from datasets import Features, Image, List, Value

    kinds: dict[str, Any] = {"categories": List(Value("string")), "seed": Value("int64"), "label_0": Value("int64")}
    kinds |= {name: Image() for name in ("chosen", "rejected", "jpg_0", "jpg_1")}
    schema = dataset_schema(layout, with_pictures=with_pictures)
    wanted = Features({name: kinds.get(name, Value("string")) for name in schema.names})
    assert Features.from_arrow_schema(schema) == wanted
    assert schema.remove_metadata().types == wanted.arrow_schema.remove_metadata().types


def test_shards_of_a_bounded_size_in_the_order_of_concepts(store: Location, tmp_path: Path):
    """150 pairs and shards of at least one row group of 64: 64 + 64 + 22 rows."""
    pairs = [MadePair(number, f"thing-{number % 7}") for number in range(150)]
    close_batch(store, "batch-1", [image_row(p, side) for p in pairs for side in ("unsafe", "safe")], files=2)
    folder, _, _ = close_pairs(store, pairs)
    out = open_location(str(tmp_path / "out"))
    seen: list[int] = []
    assert write(store, folder, out, shard_bytes=1, report=seen.append) == 3
    names = [file.name for file in (out / "data").list()]
    assert names == [f"train-0000{index}-of-00003.parquet" for index in range(3)]
    assert [pq.ParquetFile(file.path).metadata.num_rows for file in (out / "data").list()] == [64, 64, 22]
    assert sum(seen) == 150
    rows = load(out, tmp_path / "cache")
    keys = list(zip(rows["concept"], rows["pair_id"], strict=True))
    assert keys == sorted((pair.concept, pair.pair_id) for pair in pairs)


def test_equal_pairs_give_equal_files_wherever_their_pictures_lie(store: Location, folder: Location, tmp_path: Path):
    outs = [open_location(str(tmp_path / name)) for name in ("a", "b")]
    write(store, folder, outs[0])
    (store / "images").delete()
    close_batch(store, "batch-other", [image_row(p, side) for side in ("safe", "unsafe") for p in reversed(PAIRS)])
    write(store, folder, outs[1])
    first, second = ([file.read_bytes() for file in out.walk()] for out in outs)
    assert first == second


PEAK = """
import re, sys
from safetydpo.artifacts.storage import open_location
from safetydpo.pairs.export import Layout, write_dataset
from safetydpo.pairs.kept import read_kept_pairs
from safetydpo.pairs.stored_pictures import PictureIndex
store, out = (open_location(path) for path in sys.argv[1:])
pairs = read_kept_pairs((store / "pairs").list()[0])
def peak():
    # Not getrusage: its peak begins with that of the parent process.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
pictures = PictureIndex(store / "images" / "pool-1")
write_dataset(out, pairs, pictures, layout=Layout.PREFERENCE, card="", shard_bytes=20_000_000)
print(peak() - before)
"""


def peak_kilobytes(folder: Path, num_pairs: int, picture_bytes: int) -> int:
    """Return what the export of so many pairs adds to the memory of a process of its own, at most."""
    store = open_location(str(folder / "store"))
    pairs = [MadePair(number) for number in range(num_pairs)]
    draw = np.random.default_rng(0)
    for first in range(0, num_pairs, 128):
        rows = []
        for pair in pairs[first : first + 128]:
            for side in ("unsafe", "safe"):
                data = draw.bytes(picture_bytes)
                content = {"image": data, "sha256": hashlib.sha256(data).hexdigest()}
                rows.append({**failed_row(pair, side), "status": "ok", **content})
        close_batch(store, f"batch-{first}", rows)
    close_pairs(store, pairs)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, store.path, str(folder / "out")], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_memory_does_not_grow_with_the_pictures(tmp_path: Path):
    """19 MB of pictures, then 115 MB: a sixth of the difference would already be too much."""
    few = peak_kilobytes(tmp_path / "few", 160, 60_000)
    many = peak_kilobytes(tmp_path / "many", 960, 60_000)
    assert few > 5_000, "the peak is not seen"
    assert many - few < 16_000, (few, many)


def test_counts_of_kept_and_dropped(folder: Location):
    """thorn: pair 1 kept, 3 dropped; moss: 2 and 4 kept. violence: 1, 2 kept, 3 dropped; hate: 2, 4 kept."""
    counts = read_kept_pairs(folder).counts
    assert (counts.kept, counts.dropped) == (3, 1)
    assert [(g.name, g.kept, g.dropped) for g in counts.by_concept] == [("moss", 2, 0), ("thorn", 1, 1)]
    assert [(g.name, g.kept, g.dropped) for g in counts.by_category] == [("hate", 2, 0), ("violence", 2, 1)]
    assert counts.reasons == (("safe picture is not safe", 1),)


def test_a_place_where_something_stands_is_refused(store: Location, folder: Location, tmp_path: Path):
    out = open_location(str(tmp_path / "out"))
    (out / "mine.txt").write_bytes(b"x")
    with pytest.raises(
        UsageError, match="expected nothing or an empty folder at .*/out, found 1 files; choose another"
    ):
        write(store, folder, out)
    assert [file.name for file in out.walk()] == ["mine.txt"]
    with pytest.raises(UsageError, match="expected nothing or an empty folder at .*mine.txt, found a file: choose"):
        refuse_existing(out / "mine.txt")
    (out / "mine.txt").local_path.rename(out.local_path / ".hidden")
    with pytest.raises(
        UsageError, match="expected nothing or an empty folder at .*/out, found 1 files; choose another"
    ):
        refuse_existing(out)


def test_an_empty_folder_is_taken(store: Location, folder: Location, tmp_path: Path):
    out = open_location(str(tmp_path / "out")).make_folder()
    assert write(store, folder, out) == 1


def test_a_missing_picture_leaves_nothing_behind(store: Location, folder: Location, tmp_path: Path):
    (store / "images/pool-1/batch-2").delete()
    out = open_location(str(tmp_path / "new/out"))
    with pytest.raises(
        SafetyDPOError,
        match="expected 3 pictures of kept pairs in .*pool-1, found 1 missing: run `safetydpo pairs`",
    ):
        write(store, folder, out)
    assert not any(path.is_file() for path in (tmp_path / "new").rglob("*"))
    (store / "images").delete()
    with pytest.raises(SafetyDPOError, match="found 3 missing: run `safetydpo pairs` again, or export with --no-pic"):
        write(store, folder, out)


def test_a_picture_with_other_bytes(store: Location, folder: Location, tmp_path: Path):
    row = {**image_row(PAIRS[0], "safe"), "image": picture(PAIRS[1], "safe")}
    close_batch(store, "batch-2", [row])
    with pytest.raises(SafetyDPOError, match="expected picture .* as it was written, found other bytes: delete that"):
        write(store, folder, open_location(str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("damage", ["cut", "columns"])
def test_a_broken_file_of_pictures(store: Location, folder: Location, tmp_path: Path, damage: str):
    file = store / "images/pool-1/batch-2/data/part-0.parquet"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-30])
    else:
        import pyarrow as pa

        pq.write_table(table_from_rows([{"x": "y"}], pa.schema([("x", pa.string())])), file.path)
    with pytest.raises(
        SafetyDPOError, match="expected a complete Parquet file of pictures at .*part-0.parquet, found: "
    ):
        write(store, folder, open_location(str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_only_files_that_hold_kept_pictures_are_opened(store: Location, folder: Location, tmp_path: Path):
    """Of a pool that many runs share, the rest may be anything; of a file that went, the place in the index is told."""
    close_batch(store, "batch-3", [image_row(MadePair(9), side) for side in ("unsafe", "safe")])
    (store / "images/pool-1/batch-3/data/part-0.parquet").write_bytes(b"no Parquet")
    write(store, folder, open_location(str(tmp_path / "out")))
    file = store / "images/pool-1/batch-2/data/part-0.parquet"
    pq.write_table(pq.read_table(file.path).slice(0, 0), file.path)
    with pytest.raises(SafetyDPOError, match="expected picture .* in .*batch-2/data/part-0.parquet, where the pool's"):
        write(store, folder, open_location(str(tmp_path / "again")))


def test_a_batch_closed_by_a_version_without_an_index_is_exported_too(
    store: Location, folder: Location, tmp_path: Path
):
    (store / "images/pool-1/batch-1/index.parquet").delete()
    write(store, folder, open_location(str(tmp_path / "out")))
    assert len(load(open_location(str(tmp_path / "out")), tmp_path / "cache")) == len(KEPT)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("prompt_pairs", "expected prompts in .* of all 3 kept pairs, found 3 without: delete that folder and run"),
        ("memberships", "expected categories in .* of all 3 kept pairs, found 3 without"),
        ("images", "expected unsafe pictures in .* of all 3 kept pairs, found 3 without"),
    ],
)
def test_tables_that_do_not_belong_together(folder: Location, table: str, message: str):
    file = folder / f"{table}.parquet"
    pq.write_table(pq.read_table(file.path).slice(0, 0), file.path)
    with pytest.raises(SafetyDPOError, match=message):
        read_kept_pairs(folder)


def test_no_kept_pair(store: Location):
    folder, _, _ = close_pairs(store, [MadePair(1, kept=False, reason="x")])
    with pytest.raises(SafetyDPOError, match="expected kept pairs in .*, found none of 1: nothing to export"):
        read_kept_pairs(folder)


def test_onto_s3_the_card_comes_last_and_a_failure_takes_all_away(
    s3_store: Location, store: Location, folder: Location
):
    out = s3_store / "dataset"
    write(store, folder, out)
    assert [file.path.removeprefix(out.path) for file in out.walk()] == [
        "/README.md",
        "/data/train-00000-of-00001.parquet",
    ]
    with pytest.raises(UsageError, match="expected nothing or an empty folder at s3://.*, found 2 files; choose"):
        write(store, folder, out)
    (out / "README.md").delete()
    with pytest.raises(UsageError, match="found 1 files and no README.md: an export that was killed; choose another"):
        write(store, folder, out)
    out.delete()

    def fail(_rows: int) -> None:
        raise SafetyDPOError("stop")

    with pytest.raises(SafetyDPOError, match="stop"):
        write(store, folder, out, report=fail)
    assert not out.exists()
    # What an emptied folder leaves behind is nothing.
    assert write(store, folder, out) == 1


def test_the_front_matter_of_a_card_is_yaml_that_names_the_shards(store: Location, folder: Location, tmp_path: Path):
    """The library reads it too: a card with an unknown path would give no data."""
    from safetydpo.pairs.dataset_card import card_facts, render_card

    _, record, _ = close_pairs(store, PAIRS)
    kept = read_kept_pairs(folder)
    facts = card_facts(record, name="tiny: pairs", licence="cc-by-4.0", with_pictures=True, command="safetydpo x")
    card = render_card(facts, kept.counts, describe_columns(Layout.PREFERENCE, with_pictures=True))
    front = yaml.safe_load(re.match(r"---\n(.*?)---\n", card, re.DOTALL)[1])
    assert front["pretty_name"] == "tiny: pairs"
    assert front["license"] == "cc-by-4.0"
    assert front["size_categories"] == ["n<1K"]
    out = open_location(str(tmp_path / "out"))
    write_dataset(out, kept, PictureIndex(store / "images" / "pool-1"), layout=Layout.PREFERENCE, card=card)
    assert len(load(out, tmp_path / "cache")) == 3
