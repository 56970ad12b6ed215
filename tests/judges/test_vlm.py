"""The judge behind an endpoint, against a real server: what it sends, what it believes, what it does about faults."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from safetydpo.config.judges import JudgesConfig, VlmConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.build import fingerprint_judge, load_judge
from safetydpo.judges.protocol import Verdicts
from tests.judges.pictures import several
from tests.judges.vision_server import Answer, Asked, serve

SAFE = Answer('{"rating": "Safe", "category": "NA", "rationale": "colours"}')
UNSAFE = Answer('{"rating": "Unsafe", "category": "O1", "rationale": "colours"}')
NOW = {"retry-after-ms": "1"}


def settings(url: str, **more: object) -> JudgesConfig:
    return JudgesConfig.model_validate({"vlm": {"base_url": url, "model": "guard", "timeout_seconds": 5, **more}})


def judge_with(reply: Callable[[Asked], Answer], **more: object) -> tuple[Verdicts, list[Asked]]:
    with serve(reply) as server:
        verdicts = load_judge("vlm", settings(server.url, **more)).judge(several())
    return verdicts, server.asked


def is_wide(asked: Asked) -> bool:
    return asked.pixels.shape[1] > asked.pixels.shape[0]


def test_the_server_sees_the_very_pixels_and_its_ratings_come_back_in_order():
    verdicts, asked = judge_with(lambda asked: UNSAFE if is_wide(asked) else SAFE)
    assert verdicts.unsafe_score == (0.0, 0.0, 0.0, 1.0, 0.0)
    assert verdicts.is_unsafe == (False, False, False, True, False)
    assert verdicts.failure == ()
    seen = {request.pixels.shape: request.pixels for request in asked}
    for picture in several():
        assert (seen[tuple(picture.shape)] == picture.numpy()).all()
    body = asked[0].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("guard", 0.0, 256)
    assert "logprobs" not in body
    assert "You judge pictures" in asked[0].question


def test_no_picture_asks_nothing():
    with serve(lambda asked: SAFE) as server:
        assert load_judge("vlm", settings(server.url)).judge([]).unsafe_score == ()
    assert server.asked == []


def test_copies_that_fill_up_a_batch_are_asked_about_once():
    pictures = [*several()[:2], several()[1], several()[1]]
    with serve(lambda asked: UNSAFE if asked.pixels.shape[0] == 24 else SAFE) as server:
        verdicts = load_judge("vlm", settings(server.url)).judge(pictures)
    assert verdicts.unsafe_score == (0.0, 1.0, 1.0, 1.0)
    assert len(server.asked) == 2


def test_yes_and_no_come_with_their_probabilities():
    first = {"Yes": math.log(0.75), "No": math.log(0.25)}
    verdicts, asked = judge_with(lambda _: Answer("Yes", first_token=first), answer="yes_no")
    assert verdicts.unsafe_score == pytest.approx((0.75,) * 5)
    assert verdicts.is_unsafe == (True,) * 5
    assert (asked[0].body["logprobs"], asked[0].body["top_logprobs"]) == (True, 5)
    assert "must start with 'Yes' or 'No'" in asked[0].question
    verdicts, _ = judge_with(lambda _: Answer("No."), answer="yes_no")
    assert verdicts.unsafe_score == (0.0,) * 5


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer("It looks safe to me."), "malformed: a reply of 20 characters that is no JSON"),
        (Answer('{"rating": "Safe"', finish_reason="length"), "malformed: a reply of 17"),
        (Answer(None), "malformed: a message without text"),
        (Answer(raw=b'{"choices": []}'), "malformed: an answer without a message"),
        (Answer(raw=b"<html>busy</html>"), "malformed: "),
        (Answer("", refusal="I cannot look at this"), "refused by the model or its filter"),
        (Answer("", finish_reason="content_filter"), "refused by the model or its filter"),
        (Answer("no", status=400, code="content_filter"), "refused by the server's filter"),
    ],
    ids=["text", "cut", "none", "empty", "html", "refusal", "filtered", "filter_error"],
)
def test_what_is_no_answer_is_a_failure_and_counts_as_unsafe(answer: Answer, told: str):
    verdicts, asked = judge_with(lambda asked: answer if is_wide(asked) else SAFE)
    assert [verdicts.failure_of(index)[: len(told)] for index in range(5)] == ["", "", "", told, ""]
    assert math.isnan(verdicts.unsafe_score[3])
    assert [verdicts.counts_as_unsafe(index) for index in range(5)] == [False, False, False, True, False]
    assert len(asked) == 5, "an answer is not asked for again because one does not like it"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_transient_faults_are_tried_again(status: int):
    verdicts, asked = judge_with(
        lambda asked: Answer("busy", status=status, headers=NOW) if asked.times <= 2 else SAFE, max_retries=2
    )
    assert verdicts.failure == ()
    assert len(asked) == 15


def test_but_not_for_ever():
    verdicts, asked = judge_with(lambda _: Answer("busy", status=429, headers=NOW), max_retries=1)
    assert all(verdicts.failure_of(index).startswith("no answer: 429") for index in range(5))
    assert all(verdicts.counts_as_unsafe(index) for index in range(5))
    assert len(asked) == 10


def test_silence_is_no_answer():
    verdicts, _ = judge_with(
        lambda asked: Answer(SAFE.content, seconds=1.5 if is_wide(asked) else 0), timeout_seconds=0.7, max_retries=0
    )
    assert [verdicts.failure_of(index) for index in range(5)] == ["", "", "", "no answer in time", ""]


def test_a_server_that_is_gone():
    with serve(lambda _: SAFE) as server:
        url = server.url
    verdicts = load_judge("vlm", settings(url, max_retries=0)).judge(several()[:1])
    assert verdicts.failure_of(0).startswith("no answer: ")


@pytest.mark.parametrize(
    ("status", "told"),
    [(401, r"judge 'vlm'\), found 401 .*api_key_env"), (404, r"found 404 .*correct execution\.judges\.vlm\.model")],
)
def test_a_request_that_no_picture_could_mend_stops(status: int, told: str):
    with pytest.raises(SafetyDPOError, match=told):
        judge_with(lambda _: Answer("no such thing", status=status))


def test_the_key_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GUARD_KEY", "sesame-123")
    monkeypatch.setenv("OPENAI_API_KEY", "somebody-elses")
    _, asked = judge_with(lambda _: SAFE, api_key_env="GUARD_KEY")
    assert asked[0].authorization == "Bearer sesame-123"
    _, asked = judge_with(lambda _: SAFE)
    assert asked[0].authorization == "Bearer none"
    with pytest.raises(SafetyDPOError, match=r"bad key \*\*\*") as caught:
        judge_with(lambda _: Answer("bad key sesame-123", status=401), api_key_env="GUARD_KEY")
    assert "sesame" not in str(caught.value)
    monkeypatch.delenv("GUARD_KEY")
    with pytest.raises(UsageError, match="expected a key in the environment variable GUARD_KEY"):
        load_judge("vlm", settings("http://localhost/v1", api_key_env="GUARD_KEY"))


def test_its_identity_is_model_question_and_form(tmp_path: Path):
    own = fingerprint_judge("vlm", settings("http://a/v1"))
    assert fingerprint_judge("vlm", settings("http://b/v1", concurrency=1, timeout_seconds=1)) == own
    policy = tmp_path / "policy.txt"
    policy.write_text("No squares.")
    for more in ({"model": "other"}, {"answer": "yes_no"}, {"policy_file": str(policy)}, {"max_tokens": 8}):
        assert fingerprint_judge("vlm", settings("http://a/v1", **more)) != own
    _, asked = judge_with(lambda _: SAFE, policy_file=str(policy))
    assert asked[0].question.startswith("No squares.")
    judge = load_judge("vlm", settings("http://a/v1"))
    assert (judge.name, judge.version, judge.weights_sha256) == ("vlm", "guard-1", "")


def test_what_is_missing_or_wrong_is_named(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match=r"expected execution\.judges\.vlm\.base_url and model for judge 'vlm', found"):
        load_judge("vlm")
    with pytest.raises(ValidationError, match="base_url and model must be given together"):
        VlmConfig(base_url="http://a/v1")
    with pytest.raises(UsageError, match=r"expected a text file at /nowhere \(execution\.judges\.vlm\.policy_file\)"):
        fingerprint_judge("vlm", settings("http://a/v1", policy_file="/nowhere"))
    with pytest.raises(UsageError, match="without a user name, password") as caught:
        load_judge("vlm", settings("http://me:secret@a/v1"))
    assert "secret" not in str(caught.value)
    for url in ("localhost:8000", "ftp://a/v1", "http://[broken/v1"):
        with pytest.raises(UsageError, match=r"base_url such as http://localhost:8000/v1, found"):
            load_judge("vlm", settings(url))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UsageError, match=r"expected the openai package for judge 'vlm'.*safetydpo\[writer\]"):
        load_judge("vlm", settings("http://a/v1"))
