"""Two commands on one pool: neither ends with an error, and no row is made twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.ray.smoke_place import PATIENCE, ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param((16, 16), id="the same rows", marks=pytest.mark.long),
        pytest.param((12, 20), id="some of them", marks=pytest.mark.long),
    ],
)
def test_two_commands_make_each_row_once(tmp_path: Path, counts: tuple[int, int]) -> None:
    """Batches of a second each; row-003 fails once and is made again by one of them."""
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ray.two_pools", str(tmp_path), name, str(count)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_DATA_DISABLE_PROGRESS_BARS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, count in zip("ab", counts, strict=True)
    ]
    told = []
    for command, count in zip(commands, counts, strict=True):
        output, errors = command.communicate(timeout=200 * PATIENCE)
        assert command.returncode == 0, errors[-3000:]
        assert output.splitlines()[-1] == f"{count} {count}"
        told.append("toy: waiting for" in errors)
    assert any(told), "one of them must have waited for the other"
    pool = tmp_path / "pool"
    written = pa.concat_tables([pq.read_table(file) for file in pool.glob("batch-*/data/*.parquet")]).to_pylist()
    good = sorted(row["row_id"] for row in written if row["status"] == "ok")
    if counts[0] == counts[1]:
        assert good == [f"row-{index:03d}" for index in range(max(counts))]
        assert [row["row_id"] for row in written if row["status"] == "error"] == ["row-003"]
    # Of the same moment both may begin batches that overlap; readers take one row of each id.
    assert sorted(set(good)) == [f"row-{index:03d}" for index in range(max(counts))]
    for record in pool.glob("batch-*/record.json"):
        assert json.loads(record.read_text())["rows"] > 0
        assert not list((record.parent / "lease").glob("*"))
