"""A dashboard on loopback that answers as Ray's job server does, with what a test tells it to."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ray


class Dashboard(ThreadingHTTPServer):
    """Its jobs, and what it says to a new one."""

    jobs: list[dict[str, Any]]
    refusal: tuple[int, str] | None = None
    """Answer to everything."""
    raced_by: dict[str, Any] | None = None
    """A job that somebody else sends just before ours."""
    sent: list[dict[str, Any]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


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


class _Handler(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        if self.server.refusal is not None:
            self._answer(*self.server.refusal)
        elif self.path == "/api/version":
            self._answer(
                200, json.dumps({"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})
            )
        elif self.path == "/api/jobs/":
            self._answer(200, json.dumps(self.server.jobs))
        elif self.path.startswith("/api/packages/"):
            self._answer(200, "")
        else:
            self._answer(404, "no such page")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.sent.append(asked)
        if self.server.raced_by is not None:
            self.server.jobs.append(self.server.raced_by)
            self._answer(500, "Job already exists")
        else:
            self._answer(200, json.dumps({"job_id": "x", "submission_id": asked["submission_id"]}))

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_arguments: object) -> None:
        pass


@contextlib.contextmanager
def dashboard() -> Iterator[Dashboard]:
    """Serve on a free port until the block ends."""
    made = Dashboard(("127.0.0.1", 0), _Handler)
    made.jobs, made.sent = [], []
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()
