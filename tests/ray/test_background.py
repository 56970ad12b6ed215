"""Threads that wait for Ray when a command ends: they must not change its exit code, nor hold it up."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from ray_jobs import background
from tests.ray.smoke_place import MARK, PATIENCE, ROOT, Place, wait_for

WAITING = """
import sys, threading
from ray_jobs.background import end_process, in_background
began, forever = threading.Event(), threading.Event()
def wait():
    began.set()
    forever.wait({seconds})
in_background(wait)
began.wait(30)
print("out", end="")
print("err", end="", file=sys.stderr)
end_process(130)
"""
SHUT_DOWN = """
import threading, time
import ray
from ray_jobs.background import end_process, in_background
from ray_jobs.cluster import connect, disconnect
from safetydpo.config.schema import Config
connect(Config.model_validate({"name": "test", "execution": {"num_workers": 1, "logical_cpus": 4}}))

@ray.remote(num_cpus=0)
class Slow:
    def work(self):
        time.sleep(0.01)

began = threading.Event()
def ask():
    actor = Slow.remote()
    while True:
        ray.get(actor.work.remote())
        began.set()
for _ in range(4):
    in_background(ask)
began.wait(60)
disconnect()
time.sleep(1)
print("stopped", flush=True)
end_process(130)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120 * PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("seconds", [600, 0])
def test_a_process_ends_with_its_code_and_all_that_it_printed(seconds: int) -> None:
    started = time.monotonic()
    done = run(WAITING.format(seconds=seconds))
    assert (done.returncode, done.stdout, done.stderr) == (130, "out", "err")
    assert time.monotonic() - started < 60


def test_a_thread_that_has_ended_is_waited_for_no_more() -> None:
    background.in_background(lambda: None)
    assert not background.is_ray_waited_for()


@pytest.mark.slow
def test_threads_that_go_on_asking_ray_end_no_process(place: Place) -> None:
    """After `ray.shutdown` Ray's core would end the process with exit code 1, and "stopped" would never be printed."""
    done = run(SHUT_DOWN)
    assert (done.returncode, done.stdout) == (130, "stopped\n"), done.stderr[-2000:]
    assert wait_for(lambda: not place.processes(), seconds=60)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Place:
    """Its mark is in the environment of every process that the test starts."""
    from pathlib import Path

    place = Place(Path(str(tmp_path)), Path(str(tmp_path)))
    monkeypatch.setenv(MARK, place.mark)
    return place
