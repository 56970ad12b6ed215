"""What a job is, before it is sent: its name, its command, its variables."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ray_jobs.submit_plan import (
    STOPPING,
    Decision,
    Step,
    attempt_of,
    decide,
    job_environment,
    job_name,
    latest_attempt,
    plan_job,
)
from ray_jobs.submit_secrets import holds_secret, is_secret_name
from safetydpo.config.load import load_config
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError

ON_S3 = ["store=s3://bucket/store", "run_dir=s3://bucket/runs/{name}"]


def plan(root: Path, *settings: str, stage: str = "report"):
    given = [*ON_S3, *settings]
    file = root / "configs" / "smoke.yaml"
    return plan_job(load_config(file, given), file, given, stage=stage, working_dir=root, environment={"A": "b"})


def test_the_whole_chain_and_a_stage_alone(root: Path):
    whole = plan(root)
    assert whole.entrypoint == (
        "python -m ray_jobs.pipeline configs/smoke.yaml store=s3://bucket/store 'run_dir=s3://bucket/runs/{name}'"
    )
    assert whole.metadata == {"run": "smoke", "stage": "report", "run_dir": "s3://bucket/runs/smoke"}
    assert whole.environment == {"A": "b", **STOPPING}
    assert plan(root, stage="pairs").entrypoint.startswith("python -m ray_jobs.cli pairs configs/smoke.yaml store=")


def test_a_name_is_what_is_done_and_not_how_it_was_written(root: Path):
    """Order, spelling and a default that is written out make no other job; seed, place and stage do."""
    name = plan(root).name
    assert name.startswith("safetydpo-smoke-report-")
    assert len(name) == len("safetydpo-smoke-report-") + 12
    assert plan(root, "identity.seed=0").name == name
    config = load_config(root / "configs" / "smoke.yaml", list(reversed(ON_S3)))
    assert job_name(config, stage="report") == name
    others = {
        plan(root, "identity.seed=1").name,
        plan(root, "execution.num_workers=5").name,
        plan(root, "run_dir=s3://bucket/runs/else").name,
        plan(root, stage="merge").name,
    }
    assert len(others | {name}) == 5


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_whatever_a_setting_holds_stays_one_argument(text: str):
    """`sh -c` runs the entrypoint: split as a shell does, the setting comes back whole."""
    root = Path(__file__).resolve().parents[2]
    file = root / "configs" / "smoke.yaml"
    config = Config.model_validate({"execution": {"store": "/s", "run_dir": "/r"}})
    assume(not holds_secret(text) and not is_secret_name(text.partition("=")[0].rpartition(".")[2]))
    made = plan_job(config, file, [text], stage="report", working_dir=root, environment={})
    assert shlex.split(made.entrypoint) == ["python", "-m", "ray_jobs.pipeline", "configs/smoke.yaml", text]


@pytest.mark.parametrize(
    ("settings", "stage", "message"),
    [
        ([], "pears", "expected one of pairs, train, merge, search, evaluate, report for --stage, found 'pears'"),
        (
            ["store=runs/store"],
            "report",
            r"expected s3://… or an absolute path that all nodes share in execution\.store, found 'runs/store': a job "
            "works in a copy of the working folder, which the cluster deletes; add store=…",
        ),
        (["run_dir=runs/x"], "report", r"in execution\.run_dir, found 'runs/x': .*; add run_dir=…"),
    ],
)
def test_what_no_job_could_do(root: Path, settings: list[str], stage: str, message: str):
    with pytest.raises(UsageError, match=message):
        plan(root, *settings, stage=stage)


def test_a_config_that_does_not_travel(root: Path, tmp_path: Path):
    file = tmp_path / "own.yaml"
    file.write_text("name: own\n")
    config = load_config(file, ON_S3)
    with pytest.raises(UsageError, match=r"expected the config below --working-dir .*, found .*own\.yaml: copy it"):
        plan_job(config, file, [], stage="report", working_dir=root, environment={})
    with pytest.raises(UsageError, match=r"expected a folder for --working-dir, found none at .*/none"):
        plan_job(config, file, [], stage="report", working_dir=tmp_path / "none", environment={})


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ("store=s3://AKIAIOSFODNN7EXAMPLE:abc/def@bucket/x", "give each node a role, or its own ~/.aws/credentials"),
        ("identity.prompts.source=hf_" + "a" * 30, "set it on the nodes themselves"),
        ("execution.api_key=hushhush", "set it on the nodes themselves"),
    ],
)
def test_a_secret_in_a_setting_is_refused_and_not_repeated(root: Path, setting: str, advice: str):
    file = root / "configs" / "smoke.yaml"
    config = load_config(file, ON_S3)
    with pytest.raises(
        UsageError, match="expected no secret in a job's settings, found what looks like one in"
    ) as caught:
        plan_job(config, file, [setting], stage="report", working_dir=root, environment={})
    assert advice in str(caught.value)
    assert setting.partition("=")[2] not in str(caught.value)


def test_the_environment_is_chosen_by_name():
    """By hand: two of the list, one of the workers', one given, one taken from here; nothing else of this machine."""
    inherited = {"AWS_REGION": "eu-west-1", "WANDB_MODE": "offline", "HOME": "/root", "OWN": "1", "AWS_PROFILE": "p"}
    found = job_environment(inherited, ["OWN", "NEW=a=b"], workers={"OMP_NUM_THREADS": "1"})
    assert found == {
        "OMP_NUM_THREADS": "1",
        "AWS_REGION": "eu-west-1",
        "WANDB_MODE": "offline",
        "OWN": "1",
        "NEW": "a=b",
    }


SECRETS = {
    "AWS_ACCESS_KEY_ID": "give each node a role",
    "AWS_SECRET_ACCESS_KEY": "give each node a role",
    "AWS_SESSION_TOKEN": "give each node a role",
    "RAY_AUTH_TOKEN": "put the token into ~/.ray/auth_token of this machine and of each node",
    "HF_TOKEN": "set it on the nodes themselves",
    "OPENAI_API_KEY": "set it on the nodes themselves",
    "WANDB_API_KEY": "set it on the nodes themselves",
    "MLFLOW_TRACKING_PASSWORD": "set it on the nodes themselves",
    "my_secret": "set it on the nodes themselves",
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_variable_is_refused_named_or_with_a_value_and_never_taken_along(name: str):
    inherited = {name: "hush-hush"}
    assert "hush-hush" not in job_environment(inherited, [], workers={}).values()
    for text in (name, f"{name}=hush-hush"):
        with pytest.raises(
            UsageError, match=f"expected no secret among the variables of a job, found {name}: "
        ) as caught:
            job_environment(inherited, [text], workers={})
        assert SECRETS[name] in str(caught.value)
        assert "hush-hush" not in str(caught.value)


def test_a_secret_value_under_a_harmless_name():
    with pytest.raises(UsageError, match="found MLFLOW_TRACKING_URI: whoever may list jobs could read it"):
        job_environment({"MLFLOW_TRACKING_URI": "https://me:word@mlflow.example"}, [], workers={})


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "RAY_AUTH_TOKEN_PATH", "AWS_WEB_IDENTITY_TOKEN_FILE", "HF_HOME"]
)
def test_what_only_sounds_like_a_secret_may_travel(name: str):
    assert job_environment({}, [f"{name}=x"], workers={}) == {name: "x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A B=1", "expected NAME=VALUE or NAME for --env, found 'A B'"),
        ("=1", "expected NAME=VALUE or NAME for --env, found ''"),
        ("UNSET", r"expected UNSET to be set on this machine \(--env UNSET\), found it unset: give a value"),
    ],
)
def test_no_variable(text: str, message: str):
    with pytest.raises(UsageError, match=message):
        job_environment({}, [text], workers={})


@pytest.mark.parametrize(
    ("jobs", "again", "wanted"),
    [
        ([], False, Decision(Step.SUBMIT, "x-1")),
        ([("x-1", "PENDING")], False, Decision(Step.ATTACH, "x-1")),
        ([("x-1", "RUNNING")], True, Decision(Step.ATTACH, "x-1")),
        ([("x-1", "SUCCEEDED")], False, Decision(Step.NOTHING, "x-1")),
        ([("x-1", "SUCCEEDED")], True, Decision(Step.SUBMIT, "x-2")),
        ([("x-1", "FAILED"), ("x-2", "STOPPED")], False, Decision(Step.SUBMIT, "x-3")),
        ([("x-10", "RUNNING"), ("x-9", "FAILED")], False, Decision(Step.ATTACH, "x-10")),
        # Drivers without a submission, other jobs, and jobs whose names begin alike.
        (
            [(None, "RUNNING"), ("y-1", "RUNNING"), ("x-y-1", "RUNNING"), ("x-1-1", "RUNNING")],
            False,
            Decision(Step.SUBMIT, "x-1"),
        ),
    ],
)
def test_sending_twice(jobs: list[tuple[str | None, str]], again: bool, wanted: Decision):
    assert decide("x", jobs, again=again) == wanted


@given(st.lists(st.sampled_from(["PENDING", "RUNNING", "FAILED", "STOPPED", "SUCCEEDED"]), max_size=6), st.booleans())
def test_at_most_one_attempt_runs_and_an_id_is_never_used_again(statuses: list[str], again: bool):
    jobs = [(f"x-{number}", status) for number, status in enumerate(statuses, start=1)]
    decision = decide("x", reversed(jobs), again=again)
    known = dict(jobs)
    if decision.step is Step.SUBMIT:
        assert decision.submission_id not in known
        assert not statuses or statuses[-1] not in ("PENDING", "RUNNING")
    else:
        assert decision.submission_id == f"x-{len(statuses)}"


def test_attempts_are_numbers():
    assert attempt_of("x", "x-12") == 12
    assert [attempt_of("x", other) for other in (None, "x", "x-", "x-1a", "xy-1")] == [None] * 5


def test_a_job_is_found_by_its_id_or_by_its_name():
    jobs = [SimpleNamespace(submission_id=name) for name in ("x-1", "x-2", "y-1", None)]
    assert latest_attempt("x-1", jobs) == "x-1"
    assert latest_attempt("x", jobs) == "x-2"
    with pytest.raises(UsageError, match="expected a job that the cluster knows, found 'z'; known: x-1, x-2, y-1"):
        latest_attempt("z", jobs)
    with pytest.raises(UsageError, match="found 'z'; known: none"):
        latest_attempt("z", [])
