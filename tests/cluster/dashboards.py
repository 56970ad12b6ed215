"""A dashboard on loopback that answers as Ray's job server does, with what a test tells it to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import ray

from tests.loopback import LoopbackServer, QuietHandler, serving


class Dashboard(LoopbackServer):
    """Its jobs, and what it says to a new one."""

    jobs: list[dict[str, Any]]
    refusal: tuple[int, str] | None = None
    """Answer to everything."""
    raced_by: dict[str, Any] | None = None
    """A job that somebody else sends just before ours."""
    agent_comes_after: int = 0
    """So many new jobs find no agent that would start them."""
    sent: list[dict[str, Any]]


def job(submission_id: str, status: str, **more: Any) -> dict[str, Any]:
    """What the job server tells of a job."""
    return {
        "type": "SUBMISSION",
        "submission_id": submission_id,
        "status": status,
        "entrypoint": "python -m x",
        "start_time": 1_000_000,
        "metadata": {},
        **more,
    }


class _Handler(QuietHandler, BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        if self.server.refusal is not None:
            self.answer(*self.server.refusal)
        elif self.path == "/api/version":
            self.answer(
                200, json.dumps({"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})
            )
        elif self.path == "/api/jobs/":
            self.answer(200, json.dumps(self.server.jobs))
        elif self.path.startswith("/api/packages/"):
            self.answer(200, "")
        else:
            self.answer(404, "no such page")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.agent_comes_after > 0:
            self.server.agent_comes_after -= 1
            self.answer(500, "No available agent to submit job, please try again later.")
            return
        self.server.sent.append(asked)
        if self.server.raced_by is not None:
            self.server.jobs.append(self.server.raced_by)
            self.answer(500, "Job already exists")
        else:
            self.answer(200, json.dumps({"job_id": "x", "submission_id": asked["submission_id"]}))


@contextlib.contextmanager
def dashboard() -> Iterator[Dashboard]:
    """Serve on a free port until the block ends."""
    made = Dashboard(("127.0.0.1", 0), _Handler)
    made.jobs, made.sent = [], []
    with serving(made):
        yield made
