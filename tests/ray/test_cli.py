"""The command itself: help, and the results table on a terminal. Bad input: test_bad_input.py."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from ray_jobs.cli import summary_table
from safetydpo.evaluation.results import COLUMN_TITLES

HEAVY_IMPORTS = (
    "import sys; sys.argv=['safetydpo','--help']\n"
    "from ray_jobs import cli\n"
    "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
    "assert not {'torch','ray','diffusers'} & set(sys.modules), 'heavy import'\n"
)


def test_help_teaches_and_loads_no_torch():
    done = subprocess.run([sys.executable, "-c", HEAVY_IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in (
        "demo",
        "run",
        "pairs",
        "train",
        "merge",
        "search",
        "evaluate",
        "report",
        "prompts",
        "benchmarks",
        "gate",
        "compare",
        "doctor",
        "--debug",
    ):
        assert word in done.stdout


def _summary() -> dict[str, Any]:
    """The widest row names and values that a run of seven categories can have."""
    metric = {"value": -0.123, "low": -0.234, "high": 1.0, "n": 140, "unit": "rate"}
    metrics = {name: {**metric, "unit": "squared distance" if name == "kid" else "rate"} for name in COLUMN_TITLES}
    names = ["base", "expert:illegal_activity", "all_single", "searched"]
    kinds = ["base", "expert", "all_single", "searched"]
    return {
        "rows": [
            {"name": name, "kind": kind, "seed": 0, "prompt_set": "all", "split": "test", "metrics": metrics}
            for name, kind in zip(names, kinds, strict=True)
        ]
    }


@pytest.mark.parametrize(("width", "ip"), [(100, "-0.12 [-0.23, 1.00]"), (80, "-0.12")])
def test_the_table_fits_the_terminal_with_no_cell_cut_or_folded(width: int, ip: str):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary_table(_summary(), name="demo", width=width))
    text = console.export_text()
    lines = text.splitlines()
    assert "…" not in text
    assert lines[0].strip() == "Test prompts, run demo: 140 pictures of unsafe prompts a row"
    row = next(line for line in lines if "illegal_activity" in line)
    assert row.removeprefix("  illegal_activity ").lstrip().startswith(f"{ip} ")
    assert row.split()[-1] == "-0.123"
    # Title, three lines of headings, a rule, four rows.
    assert len(lines) == 9
