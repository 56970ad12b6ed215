"""A metadata service on loopback that answers as Amazon's (IMDSv2) and Google's do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

from tests.loopback import LoopbackServer, QuietHandler, serving

TOKEN_ASKED, TOKEN = "X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"


class Server(LoopbackServer):
    """What the machine's service would say, and what it was asked."""

    notice: str | None = None
    valid = 0
    """Number of the token that is taken now."""
    asked: list[str]


class Handler(QuietHandler, BaseHTTPRequestHandler):
    server: Server

    def do_PUT(self) -> None:
        self.server.asked.append(f"PUT {self.path}")
        if self.path != "/latest/api/token" or not self.headers.get(TOKEN_ASKED):
            self.answer(400)
            return
        self.answer(200, f"token-{self.server.valid}")

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get(TOKEN) != f"token-{self.server.valid}":
                self.answer(401)
            else:
                self.answer(404 if self.server.notice is None else 200, self.server.notice or "")
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers.get("Metadata-Flavor") == "Google":
            self.answer(200, self.server.notice or "FALSE")
        else:
            self.answer(403)


@contextlib.contextmanager
def metadata_server() -> Iterator[Server]:
    """Serve on a free port until the block ends."""
    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    with serving(made):
        yield made
