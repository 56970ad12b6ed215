"""The watcher over spot machines, against a metadata server on loopback that answers as Amazon's and Google's do."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ray_jobs import spot_watcher
from ray_jobs.spot_watcher import Metadata, drain_command, drain_node, main, watch
from safetydpo.errors import SafetyDPOError
from tests.cluster.metadata_server import Server


def in_seconds(seconds: float) -> str:
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": moment.strftime("%Y-%m-%dT%H:%M:%SZ")})


def test_amazon_a_token_first_then_no_notice_then_one(server: Server):
    metadata = Metadata("aws", server.url)
    assert metadata.seconds_left() is None
    assert metadata.seconds_left() is None
    # One token for all looks.
    assert server.asked == ["PUT /latest/api/token"] + ["GET /latest/meta-data/spot/instance-action"] * 2
    server.notice = in_seconds(120)
    left = metadata.seconds_left()
    assert left is not None
    assert 110 < left <= 120


def test_amazon_a_token_that_has_run_out_is_replaced(server: Server):
    metadata = Metadata("aws", server.url)
    metadata.seconds_left()
    server.valid, server.notice = 1, in_seconds(60)
    assert metadata.seconds_left() is not None
    assert server.asked.count("PUT /latest/api/token") == 2


@pytest.mark.parametrize("notice", ["", "{}", "[1]", '{"time": 3}', '{"time": "soon"}', "<html>"])
def test_amazon_a_notice_that_cannot_be_read_is_one_of_two_minutes(server: Server, notice: str):
    server.notice = notice
    assert Metadata("aws", server.url).seconds_left() == 120


def test_amazon_a_time_that_has_passed_is_now(server: Server):
    server.notice = in_seconds(-30)
    assert Metadata("aws", server.url).seconds_left() == 1


def test_google(server: Server):
    metadata = Metadata("gcp", server.url)
    assert metadata.seconds_left() is None
    server.notice = "TRUE"
    assert metadata.seconds_left() == 30


def test_a_proxy_of_the_environment_is_not_asked(server: Server, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert Metadata("gcp", server.url).seconds_left() is None


def test_it_drains_once_when_the_notice_comes(server: Server):
    drained: list[float] = []
    metadata = Metadata("gcp", server.url)
    assert not watch(metadata, drained.append, poll_seconds=0.01, looks=3)
    server.notice = "TRUE"
    assert watch(metadata, drained.append, poll_seconds=0.01)
    assert drained == [30]


def test_a_service_that_does_not_answer_is_told_once_and_asked_again(server: Server, caplog: pytest.LogCaptureFixture):
    """No server, then a refusal, then an answer: the watch goes on."""
    silent = Metadata("gcp", "http://127.0.0.1:9")
    with caplog.at_level("WARNING"):
        assert not watch(silent, lambda _: None, poll_seconds=0.01, looks=3)
    assert caplog.text.count("the metadata service does not answer") == 1
    refused = Metadata("aws", f"{server.url}/elsewhere")
    assert not watch(refused, lambda _: None, poll_seconds=0.01, looks=2)


def test_the_command_that_drains():
    command = drain_command("10.0.0.1:6379", "ab12", 119.7)
    assert command[command.index("--node-id") + 1] == "ab12"
    assert command[command.index("--deadline-remaining-seconds") + 1] == "119"
    assert command[command.index("--reason") + 1] == "DRAIN_NODE_REASON_PREEMPTION"
    assert "--deadline-remaining-seconds 1 " in " ".join(drain_command("a:1", "ab12", 0.2))


def test_a_drain_that_fails_is_tried_again_and_then_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A program in place of Ray's, which counts its calls and fails."""
    calls = tmp_path / "calls"
    script = tmp_path / "fails"
    script.write_text(f"#!/bin/sh\necho called >> {calls}\necho 'no such node' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(spot_watcher, "drain_command", lambda *_arguments: [str(script)])
    monkeypatch.setattr(spot_watcher.time, "sleep", lambda _: None)
    with pytest.raises(
        SafetyDPOError, match="expected the cluster at a:1 to drain node ab, found: no such node; the node"
    ):
        drain_node("a:1", "ab", 30)
    assert calls.read_text().count("called") == 3


@pytest.mark.parametrize("arguments", [[], ["aws"], ["azure", "a:1"], ["aws", "a:1", "b", "c", "d"]])
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: usage: python -m ray_jobs.spot_watcher aws|gcp HEAD:PORT")


def test_a_refusal_of_ray_ends_the_command_in_one_line(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A program that fails in place of Ray's."""
    server.notice = "TRUE"
    monkeypatch.setattr(spot_watcher, "DRAIN_TRIES", 1)
    monkeypatch.setattr(spot_watcher, "drain_command", lambda *_arguments: ["false"])
    assert main(["gcp", "127.0.0.1:9", server.url, "ab"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: expected the cluster at 127.0.0.1:9 to drain node ab, found: ")
    assert error.count("\n") == 1
