"""CI's time for slow tests: what it leaves out is told, and too much of it is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "code", "told"), [("0", 1, "2 of 2 tests were not run"), ("900", 0, "2 passed")])
def test_a_run_that_left_out_too_much_fails(root: Path, seconds: str, code: int, told: str) -> None:
    command = [sys.executable, "-m", "pytest", "tests/evaluation/test_report_in_chromium.py", "-m", "slow", "-n", "1"]
    done = subprocess.run(
        [*command, "-k", "two_widths", "-p", "no:cacheprovider"],
        cwd=root,
        env={**os.environ, "SAFETYDPO_SLOW_TEST_SECONDS": seconds},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout[-2000:]
    assert told in done.stdout
