from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs.state_folder import OWNER_FILE, ray_state_folder, remove_open_folders

HOLDING = """
import os, sys
from ray_jobs.state_folder import ray_state_folder
with ray_state_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_folder_is_there_and_then_gone(temporary: Path):
    with ray_state_folder() as folder:
        assert json.loads((Path(folder) / OWNER_FILE).read_text())["pid"] > 0
        (Path(folder) / "x").write_text("x")
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_one_and_that_of_a_live_one_stays(temporary: Path):
    started = [
        subprocess.Popen([sys.executable, "-c", HOLDING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = [Path(((process.stdout and process.stdout.readline()) or "").strip()) for process in started]
    killed, alive = started
    killed.kill()
    killed.wait()
    assert folders[0].is_dir()
    with ray_state_folder():
        assert not folders[0].exists()
        assert folders[1].is_dir()
    alive.communicate("")
    assert list(temporary.iterdir()) == []


def test_a_process_that_ends_at_once_takes_its_folders_along(temporary: Path):
    """As a command does that is stopped while its lanes still train."""
    folder = ray_state_folder()
    folder.__enter__()
    remove_open_folders()
    assert list(temporary.iterdir()) == []
    folder.__exit__(None, None, None)
