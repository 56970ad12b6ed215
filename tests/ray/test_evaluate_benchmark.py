"""The benchmark of judging compares like with like: both ways give every picture the same score."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.evaluate import judge_by_hand, write_pictures
from tests.ray.test_judge_pictures import judge_all


def test_both_ways_say_the_same_of_every_picture(tmp_path: Path) -> None:
    folder, threads = tmp_path / "pictures", torch.get_num_threads()
    folder.mkdir()
    write_pictures(folder, count=40, side=32)
    judge_by_hand("demo_audit", str(folder), str(tmp_path / "scores.parquet"))
    torch.set_num_threads(threads)
    by_hand = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    ours = judge_all(folder, "demo_audit")
    assert len(by_hand) == len(ours) == 40
    for row in by_hand:
        assert ours[row["picture"]]["score"] == pytest.approx(row["score"], abs=1e-6)
    assert len({round(row["score"], 6) for row in by_hand}) > 20
