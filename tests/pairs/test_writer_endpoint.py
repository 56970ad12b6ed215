"""The client against a real server: one request at a time. Whole runs: tests/ray/test_write_prompts.py."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable

import pytest

from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.pairs.writer_endpoint import EndpointWriter
from safetydpo.pairs.writer_messages import load_texts
from safetydpo.pairs.writers import Reply, UnansweredError, WriteRequest
from safetydpo.prompts.concepts import ConceptEntry
from tests.pairs.chat_server import Answer, Asked, ChatServer, good_lines, serve

REQUEST = WriteRequest(ConceptEntry(("violence",), "bomb", "test", "MIT", counterpart="balloon"), 0, 2)
KEY = "sk-very-secret-key"


def ask(
    server: ChatServer,
    request: WriteRequest = REQUEST,
    *,
    key: str | None = None,
    timeout: float = 5.0,
    retries: int = 2,
) -> Reply:
    async def once() -> Reply:
        writer = EndpointWriter(
            model="tiny",
            base_url=server.url,
            api_key=key,
            temperature=0.5,
            max_tokens=77,
            seed=3,
            timeout_seconds=timeout,
            max_retries=retries,
        )
        try:
            return await writer.write(request)
        finally:
            await writer.close()

    return asyncio.run(once())


def failing_once(failure: Answer) -> Callable[[Asked], Answer]:
    return lambda asked: failure if asked.times == 1 else Answer(good_lines(asked))


def test_a_normal_answer_with_its_tokens():
    with serve() as server:
        reply = ask(server)
    assert reply == Reply(good_lines(server.asked[0]), "stop", False, 100, 40, "tiny", 0)


def test_what_is_sent():
    with serve() as server:
        ask(server)
        ask(server, WriteRequest(REQUEST.concept, 4, 2, avoid=("a bomb on sand", "a bomb on grass")))
    first, second = (asked.body for asked in server.asked)
    assert {name: first[name] for name in ("model", "temperature", "max_tokens")} == {
        "model": "tiny",
        "temperature": 0.5,
        "max_tokens": 77,
    }
    assert first["messages"][0] == {"role": "system", "content": load_texts().system}
    assert "take its place: balloon" in first["messages"][1]["content"]
    assert "exist already" not in first["messages"][1]["content"]
    assert "- a bomb on sand\n- a bomb on grass" in second["messages"][1]["content"]
    assert 0 <= first["seed"] != second["seed"] < 2**31
    assert "stream" not in first


def test_no_key_of_the_environment_is_sent_to_any_server(monkeypatch: pytest.MonkeyPatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, KEY)
    with serve() as server:
        ask(server)
        ask(server, key="given")
    assert KEY not in str([asked.headers for asked in server.asked])
    assert [asked.headers["authorization"] for asked in server.asked] == ["Bearer none", "Bearer given"]


def test_too_many_requests_waits_as_long_as_it_is_told():
    with serve(failing_once(Answer("slow down", 429, {"Retry-After": "1"}))) as server:
        reply = ask(server)
    assert reply.num_retries == 1
    first, second = server.started_at
    assert 1.0 <= second - first < 3.0


@pytest.mark.parametrize(
    "failure",
    [
        Answer("broken", 500, {"Retry-After-Ms": "10"}),
        Answer("busy", 503, {"Retry-After-Ms": "10"}),
        Answer("late", 408, {"Retry-After-Ms": "10"}),
        Answer("locked", 409, {"Retry-After-Ms": "10"}),
        Answer("x" * 50, cut=30),
        Answer("", cut=0),
    ],
    ids=["500", "503", "408", "409", "truncated body", "empty body"],
)
def test_transient_faults_are_tried_again(failure: Answer):
    with serve(failing_once(failure)) as server:
        reply = ask(server)
    assert reply.num_retries == 1
    assert reply.text == good_lines(server.asked[-1])
    assert len(server.asked) == 2


def test_a_time_out_is_tried_again():
    with serve(failing_once(Answer(seconds=1.0))) as server:
        assert ask(server, timeout=0.3).num_retries == 1


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (Answer("slow down", 429, {"Retry-After-Ms": "5"}), "http://127.0.0.1:.*: 429 .*slow down"),
        (Answer("slow down", 429, {"Retry-After": "999"}), "429 .*slow down"),
        (Answer("broken", 500, {"Retry-After-Ms": "5"}), "500 .*broken"),
        (Answer(cut=3), "RemoteProtocolError: peer closed connection"),
    ],
)
def test_a_fault_that_stays_is_a_request_without_an_answer(failure: Answer, told: str):
    with serve(lambda _: failure) as server, pytest.raises(UnansweredError, match=told):
        ask(server, retries=1)


def test_a_server_that_never_answers_in_time():
    with (
        serve(lambda _: Answer(seconds=0.5)) as server,
        pytest.raises(UnansweredError, match="no answer from .* in time"),
    ):
        ask(server, timeout=0.1, retries=0)


def test_no_server_at_all():
    with serve() as server:
        pass
    with pytest.raises(UnansweredError, match=f"{server.url}: ConnectError: "):
        ask(server, retries=0)


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"[]",
        b"{}",
        b'"text"',
        b'{"choices": []}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": {"content": 3}}]}',
    ],
)
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_an_answer_that_is_no_completion(raw: bytes, kind: str):
    answer = Answer(raw=raw, headers={"Content-Type": kind})
    with (
        serve(lambda _: answer) as server,
        pytest.raises(UnansweredError, match="an answer that is no chat completion"),
    ):
        ask(server)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("status", "todo"),
    [
        (400, r"correct the model's settings \(--model, --max-tokens, --temperature\)"),
        (401, "name the variable that holds a valid key with --api-key-env"),
        (403, "ask for the right to use this model"),
        (404, "correct --model or --base-url"),
        (422, "see to the server"),
    ],
)
def test_a_request_that_is_refused_is_asked_once_and_the_key_is_not_repeated(status: int, todo: str):
    with (
        serve(lambda _: Answer(f"key {KEY}\nis wrong", status)) as server,
        pytest.raises(
            SafetyDPOError, match=f"take a request for 'tiny', found {status} from .* is wrong.*; {todo}"
        ) as caught,
    ):
        ask(server, key=KEY)
    assert len(server.asked) == 1
    assert KEY not in str(caught.value)
    assert "key ***" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, UnansweredError)


def test_refusals_that_the_server_marks():
    with serve(lambda _: Answer(refusal="I would rather not.")) as server:
        reply = ask(server)
    assert (reply.refused, reply.text) == (True, "I would rather not.")
    with serve(lambda _: Answer("half an answer", finish_reason="content_filter")) as server:
        reply = ask(server)
    assert (reply.refused, reply.text) == (True, "")


AZURE = json.dumps(
    {
        "error": {
            "message": "The prompt triggered the content management policy.",
            "type": None,
            "param": "prompt",
            "code": "content_filter",
            "status": 400,
            "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {}},
        }
    }
).encode()


def test_a_filter_that_declines_the_question_is_a_refusal():
    with serve(lambda _: Answer(status=400, raw=AZURE)) as server:
        reply = ask(server)
    assert reply == Reply("", "content_filter", True)
    assert len(server.asked) == 1
    with (
        serve(lambda _: Answer(status=400, raw=AZURE.replace(b'"content_filter",', b'"bad_request",'))) as server,
        pytest.raises(SafetyDPOError, match="found 400 from .*correct the model's settings"),
    ):
        ask(server)
    with (
        serve(lambda _: Answer(status=403, raw=AZURE)) as server,
        pytest.raises(SafetyDPOError, match="found 403 from"),
    ):
        ask(server)


def test_a_server_that_does_not_count():
    with serve(lambda _: Answer("x", usage=None)) as server:
        reply = ask(server)
    assert (reply.prompt_tokens, reply.completion_tokens) == (None, None)


def test_half_a_letter_can_be_stored():
    with serve(lambda _: Answer("a\ud800b🙂")) as server:
        assert ask(server).text == "a\ufffdb🙂"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("localhost:8000", "expected a base URL such as http://localhost:8000/v1, found 'localhost:8000'"),
        ("", "expected a base URL such as"),
        (
            "https://me:secret@host/v1",
            "expected a base URL without a user name, password, query or fragment, found one",
        ),
        ("me:secret@host/v1", "expected a base URL without a user name, password"),
        ("http://host/v1?api_key=secret", "expected a base URL without a user name, password"),
        ("host/v1?api_key=secret", "expected a base URL without a user name, password"),
        ("http://host/v1#secret", "expected a base URL without a user name, password"),
        ("http://[::1/v1", "expected a base URL such as"),
        ("http://host:99999/v1", "expected a base URL such as"),
    ],
)
def test_addresses_that_are_none(url: str, told: str):
    with pytest.raises(UsageError, match=told) as caught:
        EndpointWriter(
            model="m", base_url=url, api_key=None, temperature=1, max_tokens=1, seed=0, timeout_seconds=1, max_retries=0
        )
    assert "secret" not in str(caught.value)


def test_the_settings_hold_no_secret_and_no_place():
    writer = EndpointWriter(
        model="m",
        base_url="http://h/v1",
        api_key=KEY,
        temperature=1,
        max_tokens=2,
        seed=3,
        timeout_seconds=1,
        max_retries=0,
    )
    assert writer.settings == {"writer": "endpoint", "model": "m", "temperature": 1, "max_tokens": 2, "seed": 3}


def test_without_the_client(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with serve() as server, pytest.raises(UsageError, match=r"found none: pip install 'safetydpo\[writer\]'"):
        ask(server)


def test_requests_overlap_and_time_adds_up_to_one():
    """Four answers of 0.4 s each, together: less than two of them in a row would take."""

    async def together(server: ChatServer) -> float:
        writer = EndpointWriter(
            model="m",
            base_url=server.url,
            api_key=None,
            temperature=1,
            max_tokens=1,
            seed=0,
            timeout_seconds=5,
            max_retries=0,
        )
        start = time.monotonic()
        await asyncio.gather(*(writer.write(WriteRequest(REQUEST.concept, number, 1)) for number in range(4)))
        await writer.close()
        return time.monotonic() - start

    with serve(lambda asked: Answer(good_lines(asked), seconds=0.4)) as server:
        asyncio.run(together(server))
    assert server.most_at_once == 4
