"""Two methods on two experts of the smoke config, measured for real: killed on the way, and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safetydpo.evaluation.merge_units import parse_merge_unit
from tests.ray.smoke_place import PATIENCE, ROOT, SMOKE, wait_for
from tests.ray.tiny_merges import tiny_settings

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ray_jobs.cli", "merge-evidence", str(SMOKE), *tiny_settings(tmp_path)]
    command += ["execution.logical_cpus=4"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    cache = tmp_path / "store" / "merge_evidence"
    try:
        # Two measurements are there and the first unit is not.
        assert wait_for(lambda: len(list(cache.glob("*.json"))) >= 2 or first.poll() is not None, seconds=300)
        assert first.poll() is None
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    kept = {file: file.stat().st_mtime_ns for file in cache.glob("*.json")}
    experts = {file: file.stat().st_mtime_ns for file in (tmp_path / "store" / "experts").glob("*/record.json")}
    assert len(experts) == 2
    started = time.time()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600 * PATIENCE, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "unit 2 of 2: ties, 2 experts, seed 3" in done.stdout
    # Nothing that was finished is made again.
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert {file: file.stat().st_mtime_ns for file in experts} == experts
    units = [parse_merge_unit(file.read_text(), source=str(file)) for file in (tmp_path / "results").glob("*.json")]
    assert sorted(unit.method for unit in units) == ["sum", "ties"]
    assert units[0].experts == units[1].experts
    assert units[0].base == units[1].base
    assert 0 < units[0].cpu_seconds < time.time() - started + 600
    assert "2 of 2 units are measured" in (tmp_path / "page.md").read_text()
    assert json.loads(next(iter(kept)).read_text())["cpu_seconds"] > 0
