"""What is told of an error: Ray's own exception classes, made as Ray makes them, without a cluster."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable

import pyarrow as pa
import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError, RuntimeEnvSetupError, UserCodeException
from ray.exceptions import WorkerCrashedError as Crashed
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from ray_jobs import cli
from ray_jobs.failures import INTERRUPTED, explain, run_guarded, split_debug
from safetydpo.errors import SafetyDPOError, UsageError

OURS = SafetyDPOError("expected light, found none: switch it on")
TRACEBACK = """\x1b[36mray::MapWorker.submit()\x1b[39m (pid=13348, ip=10.0.0.2)
  File "ray_jobs/pools.py", line 177, in __call__
    result = self._worker(table)
             ^^^^^^^^^^^^^^^^^^^
safetydpo.errors.{kind}: expected light, found none: switch it on

The above exception was the direct cause of the following exception:

ray.exceptions.UserCodeException: UDF failed to process a data block.
"""


def task_error(cause: Exception, traceback: str = "ray::task()\nValueError: x") -> RayTaskError:
    return RayTaskError("task", traceback, cause, proctitle="ray::task()", pid=1, ip="10.0.0.2")


def in_a_task(cause: Exception) -> Exception:
    """What `ray.get` raises for a task that raised `cause`: an error of both classes."""
    return task_error(cause).as_instanceof_cause()


def test_an_error_of_ours_is_told_as_it_is():
    told = explain(OURS)
    assert (str(told), told.exit_code) == ("expected light, found none: switch it on", 1)


@pytest.mark.parametrize(
    "error",
    [
        in_a_task(OURS),
        WorkerGroupError("Training failed due to worker errors:\nTraceback", {0: OURS}),
        WorkerGroupError("Training failed", {1: in_a_task(OURS)}),
        ControllerError(in_a_task(OURS)),
        in_a_task(UserCodeException(TRACEBACK.format(kind="SafetyDPOError"))),
        ActorDiedError(task_error(OURS, TRACEBACK.format(kind="SafetyDPOError"))),
    ],
)
def test_an_error_of_ours_in_a_worker_is_told_without_rays_words(error: Exception):
    told = explain(error)
    assert (str(told), told.exit_code) == ("expected light, found none: switch it on", 1)


@pytest.mark.parametrize(
    "error",
    [
        in_a_task(UsageError("expected light, found none: switch it on")),
        in_a_task(UserCodeException(TRACEBACK.format(kind="UsageError"))),
    ],
)
def test_a_usage_error_in_a_worker_keeps_its_exit_code(error: Exception):
    told = explain(error)
    assert (str(told), told.exit_code) == ("expected light, found none: switch it on", 2)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device", "/data/x"),
            r"expected room .*, found a full disk at /data/x \(No space",
        ),
        (
            in_a_task(OSError("[Errno 28] Error writing bytes. Detail: No space left on device")),
            r"found a full disk \(",
        ),
        (
            OutOfMemoryError("Task was killed\nbecause of memory"),
            "expected enough memory, found OutOfMemoryError: Task",
        ),
        (MemoryError(), "expected enough memory, found MemoryError: lower execution.num_workers or"),
        (Crashed(), "expected the workers to live, found WorkerCrashedError: .* run the same command again"),
        (
            RuntimeEnvSetupError("pip failed\nsecond line"),
            "expected a Ray cluster that answers, found RuntimeEnvSetupError: .*: check execution.ray_address",
        ),
        (
            ConnectionError("ray client connection timeout"),
            "expected a Ray cluster that answers, found ConnectionError: ray client connection timeout: check",
        ),
        (
            in_a_task(pa.ArrowInvalid("Parquet magic bytes not found")),
            "expected this command to finish, found ArrowInvalid: Parquet magic bytes not found: run it again with",
        ),
        (
            in_a_task(
                OSError("When uploading object with key 'a' in bucket 'b': AWS Error NETWORK_CONNECTION during X")
            ),
            "expected an answer from the object store of execution.store, found: When uploading object with key 'a' in "
            "bucket 'b': AWS Error NETWORK_CONNECTION during X; check AWS_ENDPOINT_URL_S3 .*, then run the same",
        ),
        (KeyError("x"), "expected this command to finish, found KeyError: 'x': run it again with --debug"),
        (AssertionError(), "expected this command to finish, found AssertionError: run it again with --debug"),
    ],
)
def test_other_errors_become_expected_found_and_what_to_do(error: Exception, message: str):
    told = explain(error)
    assert re.search(message, str(told)), str(told)
    assert "\n" not in str(told)
    assert told.exit_code == 1


def test_an_error_of_ours_behind_another_is_found():
    outer = RuntimeError("Ray Data stopped")
    outer.__cause__ = OURS
    assert str(explain(outer)) == str(OURS)


def test_a_long_line_is_cut():
    assert len(str(explain(SafetyDPOError("x" * 5000)))) == 902


def _raise(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_run_guarded_prints_one_line_or_the_traceback_first(capsys: pytest.CaptureFixture[str]):
    assert run_guarded(lambda: None, debug=False) == 0
    assert capsys.readouterr().err == ""
    assert run_guarded(_raise(in_a_task(OURS)), debug=False) == 1
    assert capsys.readouterr().err == "error: expected light, found none: switch it on\n"
    assert run_guarded(_raise(KeyError("x")), debug=True) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: expected this command to finish, found KeyError: 'x'")


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Typer would turn it into a bare exit code."""
    monkeypatch.setattr(cli, "_chain", lambda *_, **__: _raise(KeyboardInterrupt())())
    monkeypatch.setattr(sys, "argv", ["safetydpo", "run", "x.yaml"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"


def test_debug_is_taken_anywhere(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SAFETYDPO_WORKER_LOGS", raising=False)
    assert split_debug(["run", "x.yaml"]) == (["run", "x.yaml"], False)
    monkeypatch.setenv("SAFETYDPO_WORKER_LOGS", "")
    assert split_debug(["run", "x.yaml", "--debug"]) == (["run", "x.yaml"], True)


def test_a_job_hears_ctrl_c_though_its_cluster_was_started_with_it_ignored(monkeypatch: pytest.MonkeyPatch):
    """As a shell starts what runs in the background; the variable is that of a job that is stopped by SIGINT."""
    monkeypatch.setenv("RAY_JOB_STOP_SIGNAL", "SIGINT")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run_guarded(lambda: signal.raise_signal(signal.SIGINT), debug=False) == INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)
