"""Jobs through Ray's own client, against a dashboard on loopback that says what a test tells it to."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_jobs import cli, jobs
from ray_jobs.jobs import Jobs, check_answers
from ray_jobs.submit_plan import Decision, JobPlan, Step
from safetydpo.errors import SafetyDPOError, UsageError
from tests.cluster.dashboards import Dashboard, dashboard, job


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    for name in ("RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with dashboard() as made:
        yield made


@pytest.fixture
def plan(tmp_path: Path) -> JobPlan:
    (tmp_path / "x.yaml").write_text("name: x\n")
    return JobPlan("x", "python -m y", {"A": "b"}, {"run_dir": "/runs/x"}, tmp_path)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:8265", "ray://127.0.0.1:10001", "auto", "http://", "http://me:word@host:1", "http://host:port"],
)
def test_no_address_of_a_dashboard(address: str):
    with pytest.raises(UsageError, match="expected the address of a dashboard such as http://127.0.0.1:8265") as caught:
        check_answers(address)
    assert "word" not in str(caught.value)


def test_nobody_at_the_address_is_told_at_once():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    with pytest.raises(
        SafetyDPOError, match=rf"expected a cluster that answers at http://127\.0\.0\.1:{port}, found: .*refused"
    ):
        Jobs(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (
            (401, "Unauthorized"),
            "expected a token that the cluster at .* takes, found none: put the cluster's token into",
        ),
        ((403, "Forbidden"), "expected a token that the cluster at .* takes, found a wrong one: put the cluster's"),
        ((500, "broken"), "expected the cluster at .* to carry this out, found: .*500.*; look at its dashboard"),
    ],
)
def test_what_a_cluster_refuses(head: Dashboard, refusal: tuple[int, str], message: str):
    head.refusal = refusal
    with pytest.raises(SafetyDPOError, match=message) as caught:
        Jobs(head.url)
    assert "\n" not in str(caught.value)


def test_the_address_that_was_given_is_asked_whatever_the_environment_says(
    head: Dashboard, monkeypatch: pytest.MonkeyPatch
):
    """Ray's client would follow the variables instead."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert Jobs(head.url).all() == []


def test_a_job_is_sent_with_its_environment_alone(head: Dashboard, plan: JobPlan):
    head.jobs = [job("x-1", "FAILED"), job("y-1", "RUNNING", metadata={"run_dir": "/runs/y"})]
    assert Jobs(head.url).send(plan) == Decision(Step.SUBMIT, "x-2")
    (sent,) = head.sent
    assert sent["entrypoint"] == "python -m y"
    assert sent["submission_id"] == "x-2"
    assert sent["metadata"] == {"run_dir": "/runs/x"}
    assert sent["runtime_env"]["env_vars"] == {"A": "b"}
    assert sent["runtime_env"]["working_dir"].startswith("gcs://_ray_pkg_")


@pytest.mark.parametrize(("status", "step"), [("RUNNING", Step.ATTACH), ("SUCCEEDED", Step.NOTHING)])
def test_what_is_at_work_or_done_is_not_sent_again(head: Dashboard, plan: JobPlan, status: str, step: Step):
    head.jobs = [job("x-1", status, metadata={"run_dir": "/runs/x"})]
    assert Jobs(head.url).send(plan) == Decision(step, "x-1")
    assert head.sent == []


def test_two_who_send_at_the_same_moment_have_one_job(head: Dashboard, plan: JobPlan):
    head.raced_by = job("x-1", "PENDING")
    assert Jobs(head.url).send(plan) == Decision(Step.ATTACH, "x-1")
    head.jobs, head.raced_by = [], job("z-1", "PENDING")
    with pytest.raises(SafetyDPOError, match="to carry this out, found: .*already exists"):
        Jobs(head.url).send(plan)


def test_a_head_whose_agent_is_late_is_waited_for(
    head: Dashboard, plan: JobPlan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Its dashboard answers some seconds sooner than the agent, which starts the jobs."""
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    head.agent_comes_after = 3
    assert Jobs(head.url).send(plan) == Decision(Step.SUBMIT, "x-1")
    assert len(head.sent) == 1
    assert capsys.readouterr().err == "the cluster's head has no agent yet to start the job: waiting for it\n"
    monkeypatch.setattr(jobs, "AGENT_SECONDS", 0.05)
    head.agent_comes_after = 1000
    with pytest.raises(SafetyDPOError, match=r"no agent on its head within 0\.05 s, .* taken\? .* the same command"):
        Jobs(head.url).send(plan)
    assert len(head.sent) == 1


def test_another_job_on_the_same_run_folder_is_in_the_way(head: Dashboard, plan: JobPlan):
    head.jobs = [job("other-1", "RUNNING", metadata={"run_dir": "/runs/x"})]
    with pytest.raises(
        UsageError, match="expected no other job on the run folder /runs/x, found other-1 RUNNING with other settings"
    ):
        Jobs(head.url).send(plan)
    head.jobs = [job("other-1", "STOPPED", metadata={"run_dir": "/runs/x"})]
    assert Jobs(head.url).send(plan).step is Step.SUBMIT


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["safetydpo", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_list_of_jobs(head: Dashboard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run(monkeypatch, "status", "--address", head.url) == 0
    assert capsys.readouterr().out == "no job was sent to this cluster\n"
    head.jobs = [
        job("x-2", "FAILED", start_time=5_000, end_time=65_000, metadata={"run_dir": "/runs/x"}, message="it\nbroke"),
        job("x-1", "STOPPED", start_time=1_000, end_time=3_000),
    ]
    assert run(monkeypatch, "status", "--address", head.url) == 0
    assert capsys.readouterr().out == "x-1  STOPPED  2 s\nx-2  FAILED  60 s  /runs/x\n"
    assert run(monkeypatch, "status", "x", "--address", head.url) == 0
    assert capsys.readouterr().out == "x-2  FAILED  60 s  /runs/x\nit broke\n"
    assert run(monkeypatch, "stop", "x", "--address", head.url) == 0
    assert capsys.readouterr().out == "x-2 has ended already: FAILED\n"
    assert run(monkeypatch, "logs", "y", "--address", head.url) == 2
    assert "expected a job that the cluster knows, found 'y'; known: x-1, x-2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run_dir=/r", "store=runs/store"], "expected s3://… or an absolute path that all nodes share"),
        (
            ["run_dir=/r", "store=/s", "execution.gpus_per_worker=1.5"],
            "expected a fraction in (0, 1] or a whole number",
        ),
        (["run_dir=/r", "store=/s", "--env", "HF_TOKEN=hush"], "expected no secret among the variables of a job"),
        (["run_dir=/r", "store=/s", "--stage", "pears"], "for --stage, found 'pears'"),
    ],
)
def test_a_request_that_is_wrong_by_itself_reaches_no_cluster(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    monkeypatch.chdir(root)
    code = run(monkeypatch, "submit", "configs/smoke.yaml", *arguments, "--address", "http://127.0.0.1:9")
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "hush" not in error
    assert error.count("\n") == 1


def test_a_token_that_is_missing_here_is_told_before_anything_is_asked(
    head: Dashboard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert run(monkeypatch, "status", "--address", head.url) == 2
    assert f"expected a token at {tmp_path}/none (RAY_AUTH_MODE is token), found none" in capsys.readouterr().err
