from __future__ import annotations

from typing import Any

from ray_jobs.merge_table import merge_lines
from safetydpo.artifacts.records import Record


def record(rank: int, **details: Any) -> Record:
    return Record("merged", "x", "h", 2, {}, {}, "f", counts={"rank": rank, "experts": 7}, details=details)


def test_lines_by_hand():
    suppliers = {"experts": 7, "fewest": 1, "mean": 2.875, "most": 5}
    lines = merge_lines(
        {
            "ties": record(4, truncation_error=0.1234),
            "co_merge": record(4, truncation_error=0.0, suppliers=suppliers),
            "sum": record(28, truncation_error=0.0, suppliers=None),
        }
    )
    assert lines == [
        "ties      rank 4, truncation error 12.3%",
        "co_merge  rank 4, truncation error 0.0%, 1 to 5 (mean 2.9) of 7 experts supply a layer",
        "sum       rank 28, truncation error 0.0%",
    ]
    assert merge_lines({}) == []
