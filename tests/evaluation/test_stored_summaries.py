"""A run's summary is found in its folder, in the file itself, and pooled from measured units."""

from __future__ import annotations

from pathlib import Path

import pytest

from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.evaluation.evidence import dump_unit
from safetydpo.evaluation.stored_summaries import read_summary
from safetydpo.evaluation.summary import dump_summary, overall_rows
from tests.evaluation.measured_units import make_units
from tests.evaluation.summaries import rate, row, summary_of

SUMMARY = summary_of([row("searched", {"ip": rate(1, 400)})])


def test_a_run_folder_and_the_file_itself(tmp_path: Path):
    file = tmp_path / "run" / "report" / "summary.json"
    file.parent.mkdir(parents=True)
    file.write_text(dump_summary(SUMMARY))
    for named in (tmp_path / "run", file):
        summary, place = read_summary(str(named))
        assert summary == SUMMARY
        assert place.path == str(file)


def test_in_an_object_store(s3_store: Location):
    (s3_store / "run" / "report" / "summary.json").write_bytes(dump_summary(SUMMARY).encode())
    assert read_summary(f"s3://{(s3_store / 'run').path}")[0] == SUMMARY


def test_measured_units_are_pooled_over_seeds(tmp_path: Path):
    for unit in make_units(seeds=(0, 1), rows=("base", "searched")):
        (tmp_path / f"{unit.row}-seed{unit.seed}.json").write_text(dump_unit(unit))
    summary, _ = read_summary(str(tmp_path))
    pooled = {row["name"]: row for row in overall_rows(summary)}
    assert set(pooled) == {"base", "searched"}
    assert pooled["searched"]["seed"] is None
    assert pooled["searched"]["metrics"]["ip"]["n"] == 280


def test_what_is_missing_or_broken_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match="expected a run folder or a summary.json at .*/lost, found nothing: name one"):
        read_summary(str(tmp_path / "lost"))
    with pytest.raises(UsageError, match=r"expected .*/report/summary\.json in the run folder .*, found none: finish"):
        read_summary(str(tmp_path))
    (tmp_path / "summary.json").write_text('{"schema_version": 1')
    with pytest.raises(SafetyDPOError, match=r"/summary\.json: expected summary\.json to be JSON"):
        read_summary(str(tmp_path / "summary.json"))
    (tmp_path / "summary.json").write_text(dump_summary(SUMMARY).replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(SafetyDPOError, match="expected a summary of schema_version 1, found at schema_version"):
        read_summary(str(tmp_path / "summary.json"))
    (tmp_path / "summary.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(SafetyDPOError, match=r"expected UTF-8 text in .*, found byte 0xff at 0"):
        read_summary(str(tmp_path / "summary.json"))
