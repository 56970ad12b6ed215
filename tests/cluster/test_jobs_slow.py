"""Jobs on a real head with a token: sent twice, stopped, sent again, and refused in seconds."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.heads import TOKEN, Head, head_with_token
from tests.ray.smoke_place import PATIENCE, SMOKE, wait_for

pytestmark = pytest.mark.slow
SHORT = [
    "identity.prompts.categories=[violence]",
    "identity.prompts.pairs_per_category=2",
    "identity.prompts.retention_prompts=0",
    "identity.dpo.retention_per_step=0",
    "identity.sampler.steps=2",
    "execution.num_workers=1",
]
"""Pairs of one category: seconds of work after the start of the workers."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with head_with_token(tmp_path_factory.mktemp("head")) as found:
        yield found


def run_of(folder: Path, *settings: str) -> list[str]:
    return [str(SMOKE.relative_to(SMOKE.parents[1])), f"store={folder}/store", f"run_dir={folder}/run", *settings]


def test_a_stage_sent_twice_is_one_job(head: Head, tmp_path: Path):
    """The first call waits for it; the second finds that it has succeeded, the third sends it once more."""
    command = ["submit", *run_of(tmp_path, *SHORT), "--stage", "pairs"]
    first = head.safetydpo(*command, "--wait", AWS_SECRET_ACCESS_KEY="hush-hush")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-2000:]
    name = first.stdout.splitlines()[0].removeprefix("sent ")
    assert name.endswith("-1")
    assert "pairs is done" in first.stdout
    assert list((tmp_path / "store" / "pairs").glob("*/record.json"))
    second = head.safetydpo(*command)
    assert second.stdout == f"{name} has succeeded already; nothing was sent (--again sends it once more)\n"
    third = head.safetydpo(*command, "--again", "--wait")
    assert third.stdout.startswith(f"sent {name.removesuffix('-1')}-2\n"), third.stdout + third.stderr
    shown = head.safetydpo("status").stdout
    assert [line.split()[:2] for line in shown.splitlines() if "pairs" in line] == [
        [name, "SUCCEEDED"],
        [name.removesuffix("-1") + "-2", "SUCCEEDED"],
    ]
    printed = head.safetydpo("logs", name).stdout
    assert "pairs is done" in printed
    # What the cluster tells of its jobs to whoever holds the token.
    listed = subprocess.run(
        ["ray", "job", "list", "--address", head.address], env=head.environment, capture_output=True, text=True
    )
    assert name in listed.stdout + listed.stderr
    told = listed.stdout + listed.stderr + printed
    assert "hush-hush" not in told
    assert TOKEN not in told


@pytest.mark.long
def test_a_job_that_runs_is_attached_to_and_stopped_and_the_next_one_goes_on(head: Head, tmp_path: Path):
    command = ["submit", *run_of(tmp_path, *SHORT, "identity.sampler.steps=400"), "--stage", "pairs"]
    first = head.safetydpo(*command)
    assert first.returncode == 0, first.stderr
    name = first.stdout.splitlines()[0].removeprefix("sent ")
    again = head.safetydpo(*command)
    assert again.stdout.startswith(f"{name} is at work already; nothing was sent\n")
    other = head.safetydpo("submit", *run_of(tmp_path, *SHORT, "identity.seed=1"), "--stage", "pairs")
    assert other.returncode == 2
    assert f"expected no other job on the run folder {tmp_path}/run, found {name} RUNNING" in other.stderr
    assert wait_for(lambda: (tmp_path / "run").is_dir(), seconds=120)
    stopped = head.safetydpo("stop", name.removesuffix("-1"))
    assert stopped.stdout == f"{name} STOPPED; the same submit goes on from there\n", stopped.stdout + stopped.stderr
    assert "stopped; the same command goes on from here" in head.safetydpo("logs", name).stdout
    ended = head.safetydpo("stop", name)
    assert ended.stdout == f"{name} has ended already: STOPPED\n"
    next_one = head.safetydpo(*command)
    assert next_one.stdout.startswith(f"sent {name.removesuffix('-1')}-2\n")
    assert head.safetydpo("stop", name.removesuffix("-1")).returncode == 0


def test_what_cannot_be_is_refused_with_the_reason(head: Head, tmp_path: Path):
    """More CPUs than the head has, by a job that fails; then by the doctor; then what passes it."""
    command = ["submit", *run_of(tmp_path, *SHORT, "execution.num_workers=40"), "--stage", "pairs", "--wait"]
    started = time.time()
    refused = head.safetydpo(*command)
    assert refused.returncode == 2
    assert "expected 41 CPUs (execution.num_workers 40 x execution.cpus_per_worker 1" in refused.stdout
    assert refused.stderr.startswith("error: expected safetydpo-smoke-pairs-")
    assert "to succeed, found FAILED (exit code 2)" in refused.stderr
    asked = head.safetydpo("doctor", *run_of(tmp_path, "execution.gpus_per_worker=1"))
    assert asked.returncode == 2
    assert "expected 2 GPUs (execution.num_workers 2 x execution.gpus_per_worker 1), found 0" in asked.stdout
    assert time.time() - started < 120 * PATIENCE
    fine = head.safetydpo("doctor", *run_of(tmp_path))
    assert fine.returncode == 0, fine.stdout + fine.stderr
    assert [line[:12] for line in fine.stdout.splitlines()] == [
        "ok  versions",
        "ok  CPUs: 2 ",
        "ok  GPUs: 0 ",
        "ok  store /t",
    ]
    assert not list((tmp_path / "store").iterdir())


def test_without_the_right_token_nothing_is_told(head: Head, tmp_path: Path):
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 32)
    for changes, message in (
        ({"RAY_AUTH_MODE": "disabled"}, "takes, found none: put the cluster's token into ~/.ray/auth_token"),
        ({"RAY_AUTH_TOKEN_PATH": str(wrong)}, "takes, found a wrong one: put the cluster's token"),
        ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "no")}, f"expected a token at {tmp_path / 'no'} (RAY_AUTH_MODE is"),
    ):
        started = time.time()
        done = head.safetydpo("status", **changes)
        assert done.returncode in (1, 2)
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert time.time() - started < 60 * PATIENCE


@pytest.mark.long
def test_a_submitted_environment_holds_what_was_named_and_nothing_else(head: Head, tmp_path: Path):
    """As the job's own record in the cluster shows it."""
    from tests.cluster.job_records import runtime_environment

    command = ["submit", *run_of(tmp_path, *SHORT), "--stage", "pairs", "--env", "WANDB_MODE=offline"]
    sent = head.safetydpo(*command, MY_OWN="x", AWS_REGION="eu-west-1")
    name = sent.stdout.splitlines()[0].removeprefix("sent ")
    found = json.loads(runtime_environment(head, name))["env_vars"]
    head.safetydpo("stop", name)
    assert found["AWS_REGION"] == "eu-west-1"
    assert found["WANDB_MODE"] == "offline"
    assert "MY_OWN" not in found
    assert "PATH" not in found
