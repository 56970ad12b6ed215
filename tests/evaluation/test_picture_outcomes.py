"""The table behind a report: what counts a picture, no text and no picture, judges in its metadata."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from safetydpo.artifacts.evaluation_schemas import PICTURE_OUTCOMES
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.picture_outcomes import JudgeIdentity, outcomes_table, read_picture_outcomes
from safetydpo.evaluation.rows import build_rows
from tests.evaluation.synthetic import SOURCES, make_outcome, make_outcomes, make_verdict

JUDGES = (JudgeIdentity("audit", "a-judge", "1", "f" * 64), JudgeIdentity("select", "b-judge", "2", "0" * 64))


def stored(folder: Path, outcomes: list[object]) -> Location:
    place = open_location(str(folder / "outcomes.parquet"))
    write_table(place, outcomes_table(outcomes, judges=JUDGES[::-1], run_seed=7))  # type: ignore[arg-type]
    return place


def test_by_hand(tmp_path: Path):
    outcomes = [
        make_outcome(0, audit=make_verdict(unsafe=True), select=make_verdict()),
        make_outcome(1, failure="corrupt: not a PNG"),
        make_outcome(2, prompt_set="neutral", category=None, audit=make_verdict(), clip=(30.0, 18.0)),
    ]
    found = read_picture_outcomes(stored(tmp_path, outcomes))  # type: ignore[arg-type]
    assert (found.judges, found.run_seed, list(found.rows)) == (JUDGES, 7, ["base"])
    unsafe, failed, neutral = found.rows["base"]
    assert unsafe.hits == {
        "ip": True, "ip:hate": True, "ip_select": False, "safe_and_intact_rate": False, "unrecognisable_rate": False,
    }  # fmt: skip
    assert (failed.failed, failed.hits["ip"], failed.hits["safe_and_intact_rate"]) == (True, True, False)
    assert (neutral.hits, neutral.clip_score, unsafe.clip_score) == ({"neutral_rate": True}, 30.0, None)
    assert neutral.key == ("neutral", "neutral-2", 0)


def test_it_adds_up_to_the_summary(tmp_path: Path):
    outcomes = make_outcomes(seeds=(0, 1))
    found = read_picture_outcomes(stored(tmp_path, outcomes))  # type: ignore[arg-type]
    for row in build_rows(outcomes, SOURCES, run_seed=0):
        if row["seed"] is not None:
            continue
        for name, metric in row["metrics"].items():
            # Each text once is no count of pictures.
            if metric["unit"] == "rate" and not name.endswith("_distinct"):
                hits = [own.hits[name] for own in found.rows[row["name"]] if name in own.hits]
                assert (len(hits), sum(hits) / len(hits)) == (metric["n"], pytest.approx(metric["value"]))


def test_no_text_stands_in_it_and_it_is_small(tmp_path: Path):
    place = stored(tmp_path, make_outcomes())  # type: ignore[arg-type]
    assert "text" not in pq.read_schema(place.local_path).names
    assert b"a picture of thing" not in place.read_bytes()
    assert place.size_bytes() < 50 * len(make_outcomes())


def test_a_table_that_does_not_say_who_judged_is_refused(tmp_path: Path):
    place = open_location(str(tmp_path / "outcomes.parquet"))
    write_table(place, table_from_rows([], PICTURE_OUTCOMES))
    with pytest.raises(SafetyDPOError, match="expected the judges of the pictures in the metadata of .*: make the rep"):
        read_picture_outcomes(place)
