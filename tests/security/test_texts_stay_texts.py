"""Hostile prompts, concepts and paths from the prompt file to the report, its tables and the terminal stay texts."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ray_jobs.terminal import TextConsole
from safetydpo.artifacts.csv_cells import text_cell
from safetydpo.artifacts.records import ArtifactKey, artifact_folder
from safetydpo.artifacts.storage import open_location
from safetydpo.config.gate import GatePolicy
from safetydpo.dpo.metric_sinks import TensorBoardSink
from safetydpo.errors import SafetyDPOError, shown, visible
from safetydpo.evaluation.exports import metric_rows, metrics_csv
from safetydpo.evaluation.gate import judge_row
from safetydpo.evaluation.gate_output import dump_junit
from safetydpo.evaluation.report import render_report
from safetydpo.pairs.groups import concept_group_name
from safetydpo.prompts.imported import read_pairs
from tests.evaluation.summaries import rate, row, summary_of
from tests.evaluation.synthetic import make_sheets, make_summary
from tests.ray.commands import Command
from tests.security.hostile import TEXTS

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """Pairs whose texts, concepts and row names are hostile, as JSON lines: no other format holds all of them."""
    file = tmp_path / "mine.jsonl"
    rows = [
        {"unsafe_text": f"a bomb {text}", "safe_text": f"a ball {text}", "category": "hate", "concept": text}
        for text in TEXTS
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _files_outside(folder: Path, allowed: set[str]) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and path.name not in allowed]


def test_import_and_check_keep_every_text_and_print_none_of_its_controls(
    command: Command, tmp_path: Path, prompt_file: Path
):
    table, leaks = tmp_path / "prompts.parquet", tmp_path / "leaks.csv"
    imported = command.raw("prompts", "import", str(prompt_file), "--out", str(table))
    assert imported.code == 0, imported.err
    stored = {one["text"] for one in pq.read_table(table).to_pylist()}
    assert stored == {f"a {what} {text}".strip() for text in TEXTS for what in ("bomb", "ball")}
    checked = command.raw("prompts", "check", str(table), "--against", str(prompt_file), "--out", str(leaks))
    assert checked.code == 0, checked.err
    for seen in (imported, checked):
        assert not CONTROLS.search(seen.out), CONTROLS.findall(seen.out)
    with leaks.open(newline="") as stream:
        assert {found["text"] for found in csv.DictReader(stream)} == stored
    assert not _files_outside(tmp_path, {"mine.jsonl", "prompts.parquet", "leaks.csv"})
    assert {pair.concept for pair in read_pairs(open_location(str(table)))} <= {text.strip() for text in TEXTS}


def test_names_of_experts_and_folders_cannot_leave_the_store(tmp_path: Path):
    store = open_location(str(tmp_path / "store"))
    names = [concept_group_name(text) for text in TEXTS]
    assert len(set(names)) == len(TEXTS)
    for name in names:
        assert re.fullmatch(r"[a-z0-9_]{1,80}", name)
        folder = artifact_folder(store, ArtifactKey("experts", name, {}, {}, 1))
        assert Path(folder.path).resolve().is_relative_to(tmp_path / "store")
    for text in TEXTS:
        key = ArtifactKey("experts", text, {}, {}, 1)
        try:
            path = artifact_folder(store, key).path
        except SafetyDPOError:
            continue
        assert Path(path).resolve().is_relative_to(tmp_path / "store")


@pytest.mark.parametrize("part", ["..", "a/../b", "/a", "a//b", "a\0b", ".", ""])
def test_a_path_below_another_stays_below(part: str, tmp_path: Path):
    with pytest.raises(SafetyDPOError, match="expected a plain relative path below"):
        open_location(str(tmp_path)) / part


def test_the_report_shows_them_and_obeys_none():
    summary = json.loads(json.dumps(make_summary()))
    page = render_report(summary, sheets=make_sheets(prompts=TEXTS))
    assert "<script>alert(1)" not in page
    assert "<img src=x" not in page
    assert "\"' onfocus" not in page
    assert "{{ 7 * 7 }}" in page
    assert len(re.findall(r"<script", page)) == 1
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", page)


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_tables_of_scores_hold_no_formula(number: int):
    summary = json.loads(json.dumps(make_summary()))
    summary["rows"] = [dict(summary["rows"][0], name=TEXTS[number])]
    (found, *_) = list(csv.DictReader(io.StringIO(metrics_csv(metric_rows(summary)), newline="")))
    assert found["row"] in (TEXTS[number], f"'{TEXTS[number]}")
    assert not found["row"].startswith(("=", "+", "-", "@", "\t", "\r"))
    assert text_cell(-1) == -1


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_a_row_of_that_name_is_text_in_junit(number: int):
    summary = summary_of([row("searched", {"ip": rate(1, 100)})])
    result = replace(judge_row(summary, GatePolicy(max_ip=0.1)), row=TEXTS[number])
    root = ElementTree.fromstring(dump_junit(result, source=TEXTS[number]))
    assert [element.tag for element in root] == ["testsuite"]
    assert {element.tag for element in root[0]} <= {"properties", "testcase", "system-out"}


def test_tensorboard_writes_below_its_folder_only(tmp_path: Path):
    sink = TensorBoardSink(tmp_path / "board")
    for text in TEXTS:
        sink.write({text: 1.0}, step=1)
    sink.close()
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / "board" / "tensorboard"}


def test_the_terminal_prints_them_as_they_are_written():
    """Also as cells of a table; the tags of this project still work."""
    from rich.table import Table

    sink = io.StringIO()
    console = TextConsole(file=sink, width=20_000, force_terminal=False)
    table = Table("text")
    for text in TEXTS:
        console.print(text)
        table.add_row(text)
    console.print(table)
    console.print("[bold]whole[/bold]")
    printed = sink.getvalue()
    assert not CONTROLS.search(printed)
    assert printed.count("[link=http://evil.example]press[/link]") == 2
    assert printed.endswith("whole\n")


def test_errors_show_them_in_one_line(command: Command, tmp_path: Path):
    for text in TEXTS:
        if "\0" not in text:
            seen = command.raw("run", text)
            assert seen.err.count("\n") == 1
            assert not CONTROLS.search(seen.err.rstrip("\n"))
        assert "\n" not in shown(text)
        assert not CONTROLS.search(visible(text))
    assert not list(tmp_path.glob("*it_ran*"))
    assert not Path("it_ran").exists()
