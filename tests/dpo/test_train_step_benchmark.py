from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.harness import alternate, ratio_of_medians
from benchmarks.train_step import measure


def test_ratio_by_hand() -> None:
    """Medians 4 and 2: twice as fast; one slow round of ours does not matter."""
    assert ratio_of_medians([4.0, 3.0, 9.0], [2.0, 1.0, 50.0]) == 2.0


def test_ways_alternate_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(rows) for name, rows in times.items()} == {"a": 2, "b": 2}
    assert all(one.wall_seconds >= 0 for rows in times.values() for one in rows)


def test_last_line_is_one_json_object(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure(tiny_folder, model="tiny", rounds=1, steps_per_round=1)
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result.keys() == {"benchmark", "ratios", "raw", "machine", "commit"}
    assert result["ratios"]["pairs_per_second_vs_public"] > 0
    assert result["ratios"]["network_bytes_vs_public"] < 0.5
