"""What pyarrow wrote to S3, s3fs reads: how somebody else's training opens an exported data set there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import s3fs

from safetydpo.artifacts.storage import Location
from safetydpo.pairs.export import Layout, write_dataset
from safetydpo.pairs.kept import read_kept_pairs
from safetydpo.pairs.stored_pictures import PictureIndex
from tests.pairs.stored_pairs import MadePair, close_batch, close_pairs, image_row
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

PAIRS = [MadePair(1, "thorn"), MadePair(2, "moss", ("hate", "violence"))]
TEXTS = [pair.texts[0] for pair in sorted(PAIRS, key=lambda pair: pair.concept)]
# As in docs/dataset-export.md; a process of its own, because the library keeps its event loop and its locks.
READ = """
import json, sys, datasets
folder, cache, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
rows = datasets.load_dataset(
    "parquet", data_files={"train": f"{folder}/data/*.parquet"}, split="train", storage_options=options, cache_dir=cache
)
print(json.dumps([[row["prompt"], row["chosen"].size, row["categories"]] for row in rows]))
"""


@pytest.fixture
def exported(store: Location, s3_store: Location) -> Location:
    """A small exported data set on S3; the environment leads there."""
    close_batch(store, "batch-1", [image_row(pair, side) for pair in PAIRS for side in ("unsafe", "safe")])
    out = s3_store / "out"
    pairs = read_kept_pairs(close_pairs(store, PAIRS)[0])
    write_dataset(out, pairs, PictureIndex(store / "images" / "pool-1"), layout=Layout.PREFERENCE, card="a card\n")
    return out


def test_s3fs_lists_and_reads_what_was_exported(exported: Location):
    """Endpoint and keys come from the environment, as everywhere in this project."""
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    assert sorted(filesystem.find(exported.path)) == [place.path for place in exported.walk()]
    assert filesystem.cat(f"{exported.path}/README.md") == b"a card\n"
    (shard,) = filesystem.glob(f"{exported.path}/data/*.parquet")
    assert pq.read_table(shard, filesystem=filesystem).column("prompt").to_pylist() == TEXTS
    assert filesystem.cat(shard) == Location(exported.filesystem, shard).read_bytes()


def read(exported: Location, cache: Path, options: dict[str, Any], environment: dict[str, str]) -> list[Any]:
    # Reading a bucket counts as going online for the library; the hub itself is not asked, and could not be reached.
    environment |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", READ, f"s3://{exported.path}", str(cache), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("source", ["environment", "storage_options"])
def test_the_library_reads_it_through_s3fs(exported: Location, s3_server: S3Server, tmp_path: Path, source: str):
    """Texts, decoded pictures and categories; where the server is may also be said in `storage_options`."""
    environment, options = dict(os.environ), {}
    if source == "storage_options":
        environment = {name: value for name, value in environment.items() if not name.startswith("AWS_")}
        options = {"key": ACCESS_KEY, "secret": SECRET_KEY, "endpoint_url": s3_server.endpoint}
    rows = read(exported, tmp_path / "cache", options, environment)
    assert [row[0] for row in rows] == TEXTS
    assert [row[2] for row in rows] == [["hate", "violence"], list(PAIRS[0].categories)]
    assert all(len(row[1]) == 2 and min(row[1]) > 0 for row in rows)
