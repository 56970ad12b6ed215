"""What a repeat costs and counts: stages that find everything closed, and a report whose inputs did not change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_jobs import pipeline
from ray_jobs.evaluate import EvaluatedRow
from ray_jobs.publish import card_file
from ray_jobs.report import Finished, _close, find_report, page_file, report_inputs
from ray_jobs.run import Run
from safetydpo.artifacts.layout import (
    concept_rates_file,
    merged_adapter_file,
    metrics_file,
    picture_outcomes_file,
    report_file,
    report_record,
    summary_file,
)
from safetydpo.artifacts.records import ArtifactKey, Record
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.evaluation.rows import RowSource
from safetydpo.evaluation.summary import dump_summary
from tests.evaluation.synthetic import make_summary


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Config.model_validate({"execution": {"store": f"{tmp_path}/store", "run_dir": f"{tmp_path}/run"}}))


def _time_stage(run: Run, monkeypatch: pytest.MonkeyPatch, work: Any, *, seconds: float) -> None:
    clock = iter([100.0, 100.0 + seconds])
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "time", type("Clock", (), {"time": staticmethod(lambda: next(clock))}))
        pipeline._timed(run, "pairs", work)


def test_only_work_is_added_to_a_stages_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 s of making, a look of 8 s, an interruption after 2 s, 3 s of making more: 7, 7, 9, 12."""

    def make(name: str) -> None:
        key = ArtifactKey("pairs", name, {"name": name}, {}, 1)
        # `make` of Run needs no clock of the pipeline's.
        run.make(key, lambda _folder: {"fingerprint": name})

    def fail() -> None:
        raise SafetyDPOError("stopped")

    _time_stage(run, monkeypatch, lambda: make("first"), seconds=7)
    assert run.seconds() == {"pairs": 7.0}
    _time_stage(run, monkeypatch, lambda: make("first"), seconds=8)
    assert run.seconds() == {"pairs": 7.0}
    with pytest.raises(SafetyDPOError, match="stopped"):
        _time_stage(run, monkeypatch, fail, seconds=2)
    assert run.seconds() == {"pairs": 9.0}
    _time_stage(run, monkeypatch, lambda: make("second"), seconds=3)
    assert run.seconds() == {"pairs": 12.0}
    assert [name.split("-")[0] for name in run.made] == ["first", "second"]


def test_a_place_that_is_gone_does_not_hide_why_a_stage_failed(run: Run) -> None:
    (run.run_dir / "timing.json" / "in the way").write_bytes(b"")

    def fail() -> None:
        raise OSError("the first error")

    with pytest.raises(OSError, match="the first error") as caught:
        pipeline._timed(run, "pairs", fail)
    assert "expected to write" in caught.value.__notes__[0]


def test_the_first_look_of_a_run_has_a_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything was made by another run in the same store."""
    _time_stage(run, monkeypatch, lambda: None, seconds=0.5)
    assert run.seconds() == {"pairs": 0.5}


def _record(name: str, fingerprint: str) -> Record:
    return Record("merged", name, "0" * 64, 1, {}, {}, fingerprint)


def _inputs(run: Run, **changes: Any) -> str:
    given: dict[str, Any] = {
        "experts": {"hate": _record("hate", "a")},
        "search": _record("search", "b"),
        "searched": _record("searched", "c"),
        "outcomes": _record("outcomes", "d"),
        "rows": [EvaluatedRow(RowSource("base", "base"), "", ("unsafe",))],
        "merged": {"sum": _record("sum", "e")},
        "diagnosis": _record("diagnosis", "f"),
    }
    return report_inputs(run, Finished(**{**given, **changes}))


def test_whatever_a_report_shows_changes_its_inputs(run: Run) -> None:
    same = _inputs(run)
    assert _inputs(run) == same
    run.add_seconds("report", 3.0)
    assert _inputs(run) == same
    assert _inputs(run, outcomes=_record("outcomes", "other")) != same
    assert _inputs(run, searched=_record("searched", "other")) != same
    assert _inputs(run, experts={}) != same
    assert _inputs(run, rows=[]) != same
    assert _inputs(run, merged={}) != same
    assert _inputs(run, diagnosis=_record("diagnosis", "other")) != same
    assert _inputs(replace(run, config=run.config.model_copy(update={"identity": _other_seed(run)}))) != same
    run.add_cost("report", {"cpu_seconds": 1.0})
    assert _inputs(run) == same
    run.add_cost("pairs", {"cpu_seconds": 1.0})
    changed = _inputs(run)
    assert changed != same
    run.add_seconds("pairs", 3.0)
    assert _inputs(run) not in (same, changed)


def _other_seed(run: Run) -> Any:
    return run.config.identity.model_copy(update={"seed": 1})


def test_a_whole_report_of_the_same_inputs_is_found(run: Run) -> None:
    summary = make_summary()
    assert find_report(run, "inputs") is None
    summary_file(run.run_dir).write_bytes(dump_summary(summary).encode())
    report_file(run.run_dir).write_bytes(b"<html>")
    metrics_file(run.run_dir, "csv").write_bytes(b"row")
    metrics_file(run.run_dir, "parquet").write_bytes(b"PAR1")
    merged_adapter_file(run.run_dir).write_bytes(b"adapter")
    card_file(run).write_bytes(b"# card")
    assert find_report(run, "inputs") is None
    report_record(run.run_dir).write_bytes(json.dumps({"inputs": "inputs"}).encode())
    # A report of earlier versions lacks the tables behind it and is made again.
    assert find_report(run, "inputs") is None
    picture_outcomes_file(run.run_dir).write_bytes(b"PAR1")
    assert find_report(run, "inputs") is None
    concept_rates_file(run.run_dir).write_bytes(b"PAR1")
    assert find_report(run, "inputs") == summary
    assert find_report(run, "others") is None
    summary_file(run.run_dir).write_bytes(b"{")
    assert find_report(run, "inputs") is None
    summary_file(run.run_dir).write_bytes(dump_summary(summary).encode())
    card_file(run).delete()
    assert find_report(run, "inputs") is None
    card_file(run).write_bytes(b"# card")
    assert find_report(run, "inputs") == summary
    merged_adapter_file(run.run_dir).delete()
    assert find_report(run, "inputs") is None
    merged_adapter_file(run.run_dir).write_bytes(b"adapter")
    metrics_file(run.run_dir, "csv").delete()
    assert find_report(run, "inputs") is None
    metrics_file(run.run_dir, "csv").write_bytes(b"row")
    report_record(run.run_dir).write_bytes(b"[]")
    assert find_report(run, "inputs") is None


def test_other_pictures_than_the_demos_are_evaluated_without_a_search() -> None:
    demo, real = (
        Config.model_validate({"identity": {"sampler": {"height": side, "width": side}}}).identity for side in (32, 40)
    )
    assert pipeline.stages_to("evaluate", demo) == ("pairs", "train", "merge", "search", "evaluate")
    assert pipeline.stages_to("evaluate", real) == ("pairs", "train", "merge", "evaluate")
    assert pipeline.stages_to("merge", real) == pipeline.stages_to("merge", demo) == ("pairs", "train", "merge")


@pytest.mark.parametrize(
    ("last", "evaluation", "told"),
    [
        (
            "search",
            {},
            r"for the stage 'search', whose judge knows .*found 40 x 40: name judges of real pictures .*search\.judges",
        ),
        ("report", {"judges": ["open_nsfw"]}, r"for the stage 'report', whose judge knows"),
        ("evaluate", {}, r"for judge 'demo_audit' of identity\.evaluation\.judges"),
        ("evaluate", {"judges": ["q16"]}, r"for identity\.evaluation\.clip 'demo'"),
    ],
)
def test_what_real_pictures_cannot_do_is_said_before_anything_is_done(
    tmp_path: Path, last: str, evaluation: dict[str, Any], told: str
) -> None:
    identity = {"sampler": {"height": 40, "width": 40}, "evaluation": evaluation, "pairs": {"judges": ["open_nsfw"]}}
    execution = {"store": f"{tmp_path}/store", "run_dir": f"{tmp_path}/run"}
    run = Run(Config.model_validate({"identity": identity, "execution": execution}))
    with pytest.raises(UsageError, match=told):
        pipeline.check_request(run, last=last)
    assert not list(tmp_path.iterdir())


def test_a_redacted_page_is_a_file_of_its_own(run: Run) -> None:
    """Each page knows its inputs; one of other inputs would stand beside scores that are not its own."""
    for file in (
        summary_file(run.run_dir), metrics_file(run.run_dir, "csv"), metrics_file(run.run_dir, "parquet"),
        picture_outcomes_file(run.run_dir), concept_rates_file(run.run_dir), merged_adapter_file(run.run_dir),
        card_file(run),
    ):  # fmt: skip
        file.write_bytes(dump_summary(make_summary()).encode())
    full, redacted = (page_file(run, redacted=choice) for choice in (False, True))
    assert (full.name, redacted.name) == ("index.html", "redacted.html")
    full.write_bytes(b"<html>")
    _close(run, "inputs", redacted=False)
    assert find_report(run, "inputs") == make_summary()
    assert find_report(run, "inputs", redacted=True) is None
    redacted.write_bytes(b"<html>")
    assert find_report(run, "inputs", redacted=True) is None, "not closed"
    _close(run, "inputs", redacted=True)
    assert find_report(run, "inputs", redacted=True) == find_report(run, "inputs") == make_summary()
    _close(run, "others", redacted=True)
    assert not full.is_file()
    assert find_report(run, "inputs") is None
    assert find_report(run, "others", redacted=True) == make_summary()
    full.write_bytes(b"<html>")
    report_record(run.run_dir).write_bytes(b"{")
    _close(run, "others", redacted=True)
    assert not full.is_file()
