"""A real HTTP server on 127.0.0.1 that speaks the chat protocol, counts what it is asked, and fails when told to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.loopback import LoopbackServer, QuietHandler, serving


@dataclass(frozen=True)
class Asked:
    """One request as the server saw it; `times` counts requests of this concept and number, this one included."""

    concept: str
    number: int
    num_pairs: int
    times: int
    body: dict[str, Any]
    headers: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """What the server sends: a completion of `content`, or `raw` bytes; only the first `cut` bytes if given."""

    content: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    cut: int | None = None
    seconds: float = 0.0
    finish_reason: str = "stop"
    refusal: str | None = None
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 40})

    def data(self) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.status != 200:
            return json.dumps({"error": {"message": self.content, "type": "x", "code": None}}).encode()
        usage = None if self.usage is None else {**self.usage, "total_tokens": sum(self.usage.values())}
        message = {"role": "assistant", "content": self.content, "refusal": self.refusal}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        whole = {"id": "c", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}
        return json.dumps({**whole, "usage": usage}).encode()


def good_lines(asked: Asked) -> str:
    """Pairs that differ from those of every other request."""
    return "\n".join(
        json.dumps({"unsafe": f"{asked.concept} in scene {name}", "safe": f"a flower in scene {name}"})
        for name in (f"{asked.number}.{item}" for item in range(asked.num_pairs))
    )


class ChatServer:
    """Answers with `answer`; see `serve`."""

    def __init__(self, answer: Callable[[Asked], Answer]) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self.answer = answer
        self.times: Counter[tuple[str, int]] = Counter()
        self.asked: list[Asked] = []
        self.finished: Counter[tuple[str, int]] = Counter()
        self.most_at_once = 0
        self.started_at: list[float] = []
        server = self

        class Handler(QuietHandler, BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.serve_one(self)

        self.http = LoopbackServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"{self.http.url}/v1"

    def serve_one(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        concept = re.search(r"Concept: (.*)", question)[1]
        number = int(re.search(r"request (\d+)", question)[1])
        num_pairs = int(re.search(r"Write (\d+) pairs", question)[1])
        with self._lock:
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
            self.times[concept, number] += 1
            times = self.times[concept, number]
            asked = Asked(
                concept,
                number,
                num_pairs,
                times,
                body,
                {name.lower(): value for name, value in handler.headers.items()},
            )
            self.asked.append(asked)
            self.started_at.append(time.monotonic())
        try:
            answer = self.answer(asked)
            time.sleep(answer.seconds)
        finally:
            # Before the answer is sent: its receiver may ask the next thing at once.
            with self._lock:
                self._running -= 1
        try:
            self._send(handler, answer)
        except (BrokenPipeError, ConnectionResetError):
            return
        with self._lock:
            self.finished[concept, number] += 1

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        data = answer.data()
        handler.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: answer.cut])
        handler.wfile.flush()
        if answer.cut is not None:
            handler.close_connection = True


@contextmanager
def serve(answer: Callable[[Asked], Answer] = lambda asked: Answer(good_lines(asked))) -> Iterator[ChatServer]:
    """Run a server in a thread while the block runs."""
    server = ChatServer(answer)
    with serving(server.http):
        yield server
