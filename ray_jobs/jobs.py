"""Send jobs to a cluster and look after them, through Ray's own Job SDK."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO
from urllib.parse import urlsplit

from ray_jobs.submit_plan import Decision, JobPlan, Step, decide, latest_attempt
from safetydpo.artifacts.object_store import one_line
from safetydpo.errors import SafetyDPOError, UsageError

ANSWER_SECONDS = 5.0
"""For the first contact: a wrong address is told in a moment."""
POLL_SECONDS = 1.0
AGENT_SECONDS = 120.0
"""For the head's agent, which starts the jobs: its dashboard answers sooner."""
# Ray waits 10 seconds for the agent and then says so; it has done nothing by then.
_NO_AGENT = "No available agent to submit job"
STOP_SECONDS = 90.0
"""Longer than a stopped job is given to end by itself."""
# Where these are set, Ray's client takes their address instead of the one it is given.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
TOKEN_ADVICE = (
    "put the cluster's token into ~/.ray/auth_token (mode 600) and set RAY_AUTH_MODE=token on this machine, then run "
    "the same command again"
)


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Connect to the dashboard at `address`, such as http://127.0.0.1:8265.

        Raises:
            UsageError: if the address is none.
            SafetyDPOError: if nothing answers there, or the token is missing or wrong.
        """
        self.address = address
        check_answers(address)
        with _answering(address), _addressed_by_argument():
            from ray.job_submission import JobSubmissionClient

            _quiet_client()
            self._client = JobSubmissionClient(address)

    def all(self) -> list[Any]:
        """Return what the cluster knows of each submitted job, oldest first."""
        with _answering(self.address):
            jobs = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(jobs, key=lambda job: job.start_time or 0)

    def find(self, wanted: str) -> Any:
        """Return the job of this submission id, or the last attempt at the job of this name.

        Raises:
            UsageError: if there is none.
        """
        jobs = self.all()
        submission_id = latest_attempt(wanted, jobs)
        return next(job for job in jobs if job.submission_id == submission_id)

    def send(self, plan: JobPlan, *, again: bool = False) -> Decision:
        """Send the job, unless it runs or has succeeded; return what was done.

        Raises:
            UsageError: if another job works on the same run folder, or the working folder is too large.
            SafetyDPOError: if the cluster does not take it.
        """
        jobs = self.all()
        decision = decide(plan.name, [(job.submission_id, str(job.status)) for job in jobs], again=again)
        if decision.step is not Step.SUBMIT:
            return decision
        _check_alone(plan, jobs)
        try:
            with _answering(self.address), _addressed_by_argument():
                self._submit(plan, decision.submission_id)
        except SafetyDPOError:
            # Somebody else sent the same job since we looked.
            if any(job.submission_id == decision.submission_id for job in self.all()):
                return Decision(Step.ATTACH, decision.submission_id)
            raise
        return decision

    def _submit(self, plan: JobPlan, submission_id: str) -> None:
        deadline = time.monotonic() + AGENT_SECONDS
        waiting = False
        while True:
            try:
                self._client.submit_job(
                    entrypoint=plan.entrypoint,
                    submission_id=submission_id,
                    runtime_env={"working_dir": str(plan.working_dir), "env_vars": dict(plan.environment)},
                    metadata=dict(plan.metadata),
                )
            except RuntimeError as error:
                if _NO_AGENT not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"no agent on its head within {AGENT_SECONDS:g} s, which would start the job (is its port "
                        "52365 taken? its log there is dashboard_agent.log)"
                    ) from error
            else:
                return
            if not waiting:
                print("the cluster's head has no agent yet to start the job: waiting for it", file=sys.stderr)
            waiting = True
            time.sleep(POLL_SECONDS)

    def follow(self, submission_id: str, *, out: TextIO | None = None) -> None:
        """Write the log of a job as it grows, until the job ends."""
        stream = out or sys.stdout

        async def tail() -> None:
            async for text in self._client.tail_job_logs(submission_id):
                stream.write(text)
                stream.flush()

        with _answering(self.address):
            asyncio.run(tail())

    def log(self, submission_id: str) -> str:
        """Return the log of a job."""
        with _answering(self.address):
            return str(self._client.get_job_logs(submission_id))

    def stop(self, submission_id: str) -> str:
        """Ask a job to stop and wait until it has; return its last status.

        Raises:
            SafetyDPOError: if it still runs after a while.
        """
        with _answering(self.address):
            self._client.stop_job(submission_id)
        return self.wait(submission_id, seconds=STOP_SECONDS)

    def wait(self, submission_id: str, *, seconds: float | None = None) -> str:
        """Wait until a job has ended, for ever or for `seconds`; return its last status.

        Raises:
            SafetyDPOError: if it still runs by then.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            with _answering(self.address):
                status = self._client.get_job_status(submission_id)
            if status.is_terminal():
                return str(status)
            if deadline is not None and time.monotonic() > deadline:
                raise SafetyDPOError(
                    f"expected {submission_id} to end within {seconds:g} s, found it {status}: look at its log, then "
                    "stop it again"
                )
            time.sleep(POLL_SECONDS)


def check_answers(address: str, connect: Callable[..., Any] = socket.create_connection) -> None:
    """See that somebody listens at a dashboard's address; Ray's client would wait for minutes.

    Raises:
        UsageError: if the address is not of the form http://HOST:PORT.
        SafetyDPOError: if nobody answers within seconds.
    """
    try:
        parts = urlsplit(address)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise UsageError(
            f"expected the address of a dashboard such as http://127.0.0.1:8265 in --address, found "
            f"{address.rpartition('@')[2]!r}: open a tunnel with `ray dashboard cluster.yaml` and give its end"
        )
    try:
        connect((parts.hostname, port), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise SafetyDPOError(
            f"expected a cluster that answers at {address}, found: {one_line(error)}; open the tunnel (`ray dashboard "
            "cluster.yaml`) or correct --address, then run the same command again"
        ) from error


def _check_alone(plan: JobPlan, jobs: Sequence[Any]) -> None:
    for job in jobs:
        here = (job.metadata or {}).get("run_dir") == plan.metadata["run_dir"]
        if here and str(job.status) in ("PENDING", "RUNNING"):
            raise UsageError(
                f"expected no other job on the run folder {plan.metadata['run_dir']}, found {job.submission_id} "
                f"{job.status} with other settings: wait for it, `safetydpo stop` it, or set another run_dir"
            )


def _quiet_client() -> None:
    # They report each step of the upload, that .git stays at home, and that the demo's weights are a large file:
    # nothing of it is a user's concern. A folder that is too large is an error.
    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    for name in ("packaging", "working_dir"):
        logging.getLogger(f"ray._private.runtime_env.{name}").setLevel(logging.ERROR)


@contextmanager
def _addressed_by_argument() -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def _answering(address: str) -> Iterator[None]:
    """Turn an error of the Job SDK into one line of ours."""
    from ray.exceptions import AuthenticationError
    from requests import RequestException

    try:
        yield
    except AuthenticationError as error:
        found = "a wrong one" if "Authentication failed" in str(error) else "none"
        raise SafetyDPOError(
            f"expected a token that the cluster at {address} takes, found {found}: {TOKEN_ADVICE}"
        ) from error
    except (RequestException, ConnectionError, RuntimeError, ValueError) as error:
        raise SafetyDPOError(
            f"expected the cluster at {address} to carry this out, found: {_short(one_line(error))}; look at its "
            "dashboard, then run the same command again"
        ) from error


def _short(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else f"{text[:limit]} …"
