"""What a gate decided, for machines: JSON, and JUnit XML for the test report of a release pipeline."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from typing import Any

from safetydpo.evaluation.gate import Check, GateResult

SCHEMA_VERSION = 1
SHOWN_FAILURES = 5
# XML 1.0 has no way to write these, not even as references.
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def describe_threshold(check: Check) -> str:
    """Return a threshold in words: `ip ≤ 0.1`."""
    sign = "≤" if check.threshold.rule == "max" else "≥"
    return f"{check.threshold.metric} {sign} {check.threshold.limit:g}"


def describe_failures(result: GateResult) -> str:
    """Return the failed pictures of the row by name, the first few of many; empty if there are none."""
    failed = result.failed_images
    if not failed:
        return ""
    named = "; ".join(
        f"prompt {image['prompt_id'][:12]}, seed {image['seed']}: {image['reason']}"
        for image in failed[:SHOWN_FAILURES]
    )
    more = f"; and {len(failed) - SHOWN_FAILURES:,} more" if len(failed) > SHOWN_FAILURES else ""
    return f"{len(failed):,} pictures failed and count against the row ({named}{more})"


def result_json(result: GateResult, *, source: str, config_hash: str) -> dict[str, Any]:
    """Return all of a result as JSON values; `source` is the file that was judged."""
    return {
        "schema_version": SCHEMA_VERSION,
        "source": source,
        "config_hash": config_hash,
        "row": result.row,
        "state": result.state,
        "passed": result.state == "passed",
        "confidence": result.confidence,
        "checks": [
            {**asdict(check.threshold), **{key: value for key, value in asdict(check).items() if key != "threshold"}}
            for check in result.checks
        ],
        "failed_images": [dict(image) for image in result.failed_images],
    }


def dump_result(result: GateResult, *, source: str, config_hash: str) -> str:
    """Return the text of `result_json`."""
    document = result_json(result, source=source, config_hash=config_hash)
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def dump_junit(result: GateResult, *, source: str) -> str:
    """Return a result as JUnit XML: a test case per threshold.

    A broken limit is a `failure`; too few pictures and a metric that was not measured are an `error`, whose `type` says
    which: the test itself could not be carried out. Both make a pipeline stop.
    """
    kinds = [_kind(check) for check in result.checks]
    counts = {
        "tests": str(len(kinds)),
        "failures": str(kinds.count("failure")),
        "errors": str(kinds.count("error")),
        "skipped": "0",
        "time": "0",
    }
    root = ElementTree.Element("testsuites", {"name": "safetydpo gate", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _text(f"safetydpo gate: {result.row}"), **counts})
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in (
        ("source", source),
        ("row", result.row),
        ("state", result.state),
        ("confidence", f"{result.confidence:g}"),
        ("failed_pictures", str(len(result.failed_images))),
    ):
        ElementTree.SubElement(properties, "property", {"name": name, "value": _text(value)})
    for check, kind in zip(result.checks, kinds, strict=True):
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {
                "classname": _text(f"safetydpo.gate.{result.row}"),
                "name": _text(describe_threshold(check)),
                "time": "0",
            },
        )
        if kind is not None:
            told = ElementTree.SubElement(case, kind, {"type": check.state, "message": _text(check.why)})
            told.text = _text(check.why)
    failures = describe_failures(result)
    if failures:
        ElementTree.SubElement(suite, "system-out").text = _text(failures)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _kind(check: Check) -> str | None:
    if check.state == "passed":
        return None
    return "failure" if check.state == "failed" else "error"


def _text(text: str) -> str:
    """Return a text without the characters that XML cannot hold; a file's name may have any."""
    return _NO_XML.sub("\ufffd", text)
