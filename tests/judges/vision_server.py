"""A real HTTP server on 127.0.0.1 that speaks the vision form of the chat protocol and fails when told to."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
from PIL import Image

from tests.loopback import LoopbackServer, QuietHandler, serving


@dataclass(frozen=True)
class Asked:
    """One request: the picture's pixels as the server decoded them, the question, and how often it came so far."""

    pixels: np.ndarray
    question: str
    times: int
    body: dict[str, Any]
    authorization: str


@dataclass(frozen=True)
class Answer:
    """What is sent: a completion of `content`, or `raw` bytes."""

    content: str | None = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    seconds: float = 0.0
    finish_reason: str = "stop"
    refusal: str | None = None
    code: str | None = None
    first_token: dict[str, float] | None = None

    def data(self) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.status != 200:
            return json.dumps({"error": {"message": self.content, "type": "x", "code": self.code}}).encode()
        message = {"role": "assistant", "content": self.content, "refusal": self.refusal}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        if self.first_token is not None:
            candidates = [{"token": t, "logprob": p, "bytes": None} for t, p in self.first_token.items()]
            first = {**candidates[0], "top_logprobs": candidates}
            choice["logprobs"] = {"content": [first], "refusal": None}
        whole = {"id": "c", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}
        return json.dumps(whole).encode()


class VisionServer:
    """Answers with `answer`; see `serve`."""

    def __init__(self, answer: Callable[[Asked], Answer]) -> None:
        self._lock = threading.Lock()
        self._times: dict[bytes, int] = {}
        self.asked: list[Asked] = []
        server = self

        class Handler(QuietHandler, BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reply = answer(server.note(body, self.headers.get("Authorization", "")))
                time.sleep(reply.seconds)
                data = reply.data()
                try:
                    self.send_response(reply.status)
                    for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass

        self.http = LoopbackServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"{self.http.url}/v1"

    def note(self, body: dict[str, Any], authorization: str) -> Asked:
        picture, text = body["messages"][-1]["content"]
        kind, _, data = picture["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        raw = base64.b64decode(data, validate=True)
        with self._lock:
            self._times[raw] = self._times.get(raw, 0) + 1
            asked = Asked(np.array(Image.open(io.BytesIO(raw))), text["text"], self._times[raw], body, authorization)
            self.asked.append(asked)
        return asked


@contextmanager
def serve(answer: Callable[[Asked], Answer]) -> Iterator[VisionServer]:
    """Run a server in a thread while the block runs."""
    server = VisionServer(answer)
    with serving(server.http):
        yield server
