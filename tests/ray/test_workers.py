"""What a pool's worker does with rows that fail, without Ray or networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from ray_jobs.workers import image_error_row, make_each
from safetydpo.artifacts.schemas import IMAGES
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.errors import SafetyDPOError


def _rows(*names: str) -> list[dict[str, Any]]:
    return [{"image_id": name, "attempt": 2} for name in names]


def _error_row(row: Mapping[str, Any], error: BaseException) -> dict[str, object]:
    return {"image_id": row["image_id"], "made": f"failed: {error}"}


class Maker:
    """Makes rows; those of `bad` make every call fail that they are part of."""

    def __init__(self, error: Exception, *bad: str) -> None:
        self.error, self.bad = error, bad
        self.calls: list[list[str]] = []

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
        names = [row["image_id"] for row in rows]
        self.calls.append(names)
        if set(names) & set(self.bad):
            raise self.error
        return [{"image_id": name, "made": "ok"} for name in names]


def test_rows_that_work_are_made_together():
    make = Maker(ValueError())
    assert [row["made"] for row in make_each(_rows("a", "b", "c"), make, error_row=_error_row)] == ["ok"] * 3
    assert make.calls == [["a", "b", "c"]]


@pytest.mark.parametrize(
    "error",
    [ValueError("no"), RuntimeError("no"), SafetyDPOError("no"), IndexError("no"), MemoryError("no"), OSError("no")],
)
def test_a_bad_row_does_not_take_its_neighbours_along(error: Exception):
    make = Maker(error, "b")
    made = make_each(_rows("a", "b", "c"), make, error_row=_error_row)
    assert [row["image_id"] for row in made] == ["a", "b", "c"]
    assert [row["made"] for row in made] == ["ok", "failed: no", "ok"]
    assert make.calls == [["a", "b", "c"], ["a"], ["b"], ["c"]]


@pytest.mark.parametrize("message", ["device-side assert triggered", "uncorrectable ECC error", "CUDA error: x"])
def test_a_broken_device_ends_the_process(message: str):
    make = Maker(RuntimeError(message), "b")
    with pytest.raises(RuntimeError, match=message):
        make_each(_rows("a", "b"), make, error_row=_error_row)
    assert make.calls == [["a", "b"]]


def test_an_error_of_code_is_no_bad_row():
    with pytest.raises(TypeError, match="a bug"):
        make_each(_rows("a"), Maker(TypeError("a bug"), "a"), error_row=_error_row)


def test_the_error_row_of_a_picture_fits_its_table():
    row = image_error_row(_rows("a")[0], ValueError("two\nlines"))
    assert table_from_rows([row], IMAGES).to_pylist() == [
        {
            "image_id": "a",
            "image": None,
            "sha256": "",
            "status": "error",
            "error": "two lines",
            "attempt": 2,
            "width": 0,
            "height": 0,
            "format": "",
            "micro_batch": None,
        }
    ]
