"""A metadata service on loopback that answers as Amazon's (IMDSv2) and Google's do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN_ASKED, TOKEN = "X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"


class Server(ThreadingHTTPServer):
    """What the machine's service would say, and what it was asked."""

    notice: str | None = None
    valid = 0
    """Number of the token that is taken now."""
    asked: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_PUT(self) -> None:
        self.server.asked.append(f"PUT {self.path}")
        if self.path != "/latest/api/token" or not self.headers.get(TOKEN_ASKED):
            self._answer(400)
            return
        self._answer(200, f"token-{self.server.valid}")

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get(TOKEN) != f"token-{self.server.valid}":
                self._answer(401)
            else:
                self._answer(404 if self.server.notice is None else 200, self.server.notice or "")
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers.get("Metadata-Flavor") == "Google":
            self._answer(200, self.server.notice or "FALSE")
        else:
            self._answer(403)

    def _answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_arguments: object) -> None:
        pass


@contextlib.contextmanager
def metadata_server() -> Iterator[Server]:
    """Serve on a free port until the block ends."""
    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()
