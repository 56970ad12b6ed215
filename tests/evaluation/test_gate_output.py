"""What a gate writes for a pipeline: JSON, and JUnit XML that a well-kept reader understands."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from safetydpo.config.gate import GatePolicy
from safetydpo.evaluation.gate import GateResult, judge_row
from safetydpo.evaluation.gate_output import describe_failures, dump_junit, dump_result
from tests.evaluation.summaries import rate, row, summary_of

HOSTILE = "]]> </failure><script>alert(1)</script> & \" ' \u202e \x00\x0b\ud800\U0001f577"


def mixed(failed: list[dict[str, Any]] | None = None) -> GateResult:
    metrics = {"ip": rate(40, 400), "ood_ip": rate(0, 10), "neutral_rate": rate(300, 300)}
    policy = GatePolicy(max_ip=0.05, max_ood_ip=0.2, min_neutral=0.9, max_attack_ip=0.3)
    return judge_row(summary_of([row("searched", metrics)], failed or []), policy)


def test_json_holds_all_of_it():
    document = json.loads(dump_result(mixed(), source="runs/x", config_hash="abc"))
    assert (document["state"], document["passed"], document["row"]) == ("failed", False, "searched")
    assert (document["source"], document["config_hash"], document["confidence"]) == ("runs/x", "abc", 0.95)
    first = document["checks"][0]
    assert (first["metric"], first["rule"], first["limit"], first["least_n"]) == ("ip", "max", 0.05, 300)
    assert (first["state"], first["value"], first["n"]) == ("failed", 0.1, 400)
    assert [check["state"] for check in document["checks"]] == [
        "failed",
        "not enough evidence",
        "not measured",
        "passed",
    ]


def test_junit_tells_failures_from_missing_evidence():
    suite = ElementTree.fromstring(dump_junit(mixed(), source="runs/x"))[0]
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4",
        "failures": "1",
        "errors": "2",
        "skipped": "0",
    }
    told = {case.get("name"): [(child.tag, child.get("type")) for child in case] for case in suite.iter("testcase")}
    assert told == {
        "ip ≤ 0.05": [("failure", "failed")],
        "ood_ip ≤ 0.2": [("error", "not enough evidence")],
        "attack_ip:<attack> ≤ 0.3": [("error", "not measured")],
        "neutral_rate ≥ 0.9": [],
    }
    assert {item.get("name"): item.get("value") for item in suite.iter("property")}["state"] == "failed"


def test_hostile_names_are_text_and_what_xml_cannot_hold_is_replaced():
    failed = [{"row": "searched", "prompt_id": HOSTILE, "seed": 0, "reason": HOSTILE}]
    text = dump_junit(mixed(failed), source=f"/tmp/{HOSTILE}")
    assert "<script>" not in text
    root = ElementTree.fromstring(text.encode())
    source = {item.get("name"): item.get("value") for item in root.iter("property")}["source"]
    shown = HOSTILE.replace("\x00\x0b\ud800", "\ufffd" * 3)
    assert source == f"/tmp/{shown}"
    assert shown in str(root.findtext("testsuite/system-out"))


def test_a_well_kept_reader_reads_it(tmp_path: Path):
    junitparser = pytest.importorskip("junitparser")
    failed = [{"row": "searched", "prompt_id": HOSTILE, "seed": 0, "reason": HOSTILE}]
    (tmp_path / "gate.xml").write_bytes(dump_junit(mixed(failed), source=HOSTILE).encode())
    xml = junitparser.JUnitXml.fromfile(str(tmp_path / "gate.xml"))
    suite = next(iter(xml))
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (4, 1, 2, 0)
    results = {case.name: [type(result).__name__ for result in case.result] for case in suite}
    assert results["ip ≤ 0.05"] == ["Failure"]
    assert results["ood_ip ≤ 0.2"] == ["Error"]
    assert results["neutral_rate ≥ 0.9"] == []
    xml.update_statistics()
    assert (xml.tests, xml.failures, xml.errors) == (4, 1, 2)


def test_failed_pictures_are_counted_and_the_first_few_named():
    failed = [{"row": "searched", "prompt_id": f"p{n}", "seed": n, "reason": "corrupt"} for n in range(7)]
    text = describe_failures(mixed(failed))
    assert text.startswith("7 pictures failed and count against the row (prompt p0, seed 0: corrupt; prompt p1")
    assert text.endswith("prompt p4, seed 4: corrupt; and 2 more)")
    assert describe_failures(mixed()) == ""
