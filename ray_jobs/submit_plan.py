"""What a submitted job is: its id, its command, its environment. Pure: nothing is sent from here.

A job is named after what it does. The same config, settings and stage give the same name, whoever sends it, so that
sending it twice is one job.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ray_jobs.pipeline import STAGES
from ray_jobs.submit_secrets import holds_secret, is_secret_name, where_it_belongs
from safetydpo.artifacts.object_store import ENDPOINT_VARIABLES, REGION_VARIABLES
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError

TRAVELLING = (
    *ENDPOINT_VARIABLES,
    *REGION_VARIABLES,
    "HF_HUB_OFFLINE",
    "SAFETYDPO_WORKER_LOGS",
    "WANDB_MODE",
    "WANDB_PROJECT",
    "MLFLOW_TRACKING_URI",
)
"""Variables of this machine that go with a job if they are set; no other does unless it is named."""
STOPPING = {
    # As Ctrl-C does, so that a stopped job gives its leases back; then a minute until it is killed.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
}
ENDED_WITHOUT_RESULT = ("FAILED", "STOPPED")
_DIGITS_OF_HASH = 12
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ATTEMPT = re.compile(r"-(\d+)")


@dataclass(frozen=True)
class JobPlan:
    """A job before it is sent."""

    name: str
    """The submission id without the number of the attempt."""
    entrypoint: str
    """The command line, each argument quoted: Ray hands it to a shell."""
    environment: Mapping[str, str]
    metadata: Mapping[str, str]
    """What the job says of itself to whoever lists jobs."""
    working_dir: Path


class Step(Enum):
    """What sending a job comes to."""

    SUBMIT = "submit"
    ATTACH = "attach"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Decision:
    """What to do, about which submission id."""

    step: Step
    submission_id: str


def plan_job(
    config: Config,
    file: Path,
    settings: Sequence[str],
    *,
    stage: str,
    working_dir: Path,
    environment: Mapping[str, str],
) -> JobPlan:
    """Return the job that runs all stages of a config up to `stage` on a cluster.

    Args:
        config: the loaded config, `settings` applied.
        file: the config file; it must lie in `working_dir`, which travels.
        settings: key.path=value, as they are handed on.
        stage: the last stage.
        working_dir: folder that is copied to the cluster.
        environment: variables of the job and its workers; see `job_environment`.

    Raises:
        UsageError: if the stage is unknown, the config lies elsewhere, a setting holds a secret, or store or run
            folder would lie in the copied folder, which the cluster deletes.
    """
    if stage not in STAGES:
        raise UsageError(f"expected one of {', '.join(STAGES)} for --stage, found {stage!r}")
    place = travelling_path(file, working_dir)
    for setting in settings:
        if holds_secret(setting) or is_secret_name(setting.partition("=")[0].rpartition(".")[2]):
            raise UsageError(
                f"expected no secret in a job's settings, found what looks like one in "
                f"{setting.partition('=')[0]!r}: whoever may list jobs could read it; "
                f"{where_it_belongs('AWS_' if '://' in setting else '')}"
            )
    for name, value in (("store", config.execution.store), ("run_dir", config.execution.run_dir)):
        if "://" not in value and not value.startswith("/"):
            raise UsageError(
                f"expected s3://… or an absolute path that all nodes share in execution.{name}, found {value!r}: a job "
                f"works in a copy of the working folder, which the cluster deletes; add {name}=…"
            )
    run_dir = config.execution.run_dir.replace("{name}", config.name)
    module = ["ray_jobs.pipeline"] if stage == STAGES[-1] else ["ray_jobs.cli", stage]
    return JobPlan(
        name=job_name(config, stage=stage),
        entrypoint=shlex.join(["python", "-m", *module, place, *settings]),
        environment={**environment, **STOPPING},
        metadata={"run": config.name, "stage": stage, "run_dir": run_dir},
        working_dir=working_dir,
    )


def job_name(config: Config, *, stage: str) -> str:
    """Return `safetydpo-NAME-STAGE-HASH`; the hash is over every setting, however it was written, and the stage."""
    content = {"config": config.model_dump(mode="json"), "stage": stage}
    return f"safetydpo-{config.name}-{stage}-{sha256_of(content)[:_DIGITS_OF_HASH]}"


def attempt_of(name: str, submission_id: str | None) -> int | None:
    """Return which attempt at the job `name` a submission is, from 1; None if it is another job's."""
    if submission_id is None or not submission_id.startswith(name):
        return None
    found = _ATTEMPT.fullmatch(submission_id[len(name) :])
    return int(found[1]) if found else None


def decide(name: str, jobs: Iterable[tuple[str | None, str]], *, again: bool = False) -> Decision:
    """Return what sending the job `name` means, given (submission id, status) of all jobs that the cluster knows.

    Its last attempt runs or waits: attach to it. It succeeded: nothing is to be done, unless `again`. It failed, was
    stopped, or never was: the next attempt.
    """
    attempts = {attempt: status for job, status in jobs if (attempt := attempt_of(name, job)) is not None}
    last = max(attempts, default=0)
    status = attempts.get(last, "STOPPED")
    if status == "SUCCEEDED" and not again:
        return Decision(Step.NOTHING, f"{name}-{last}")
    if status not in (*ENDED_WITHOUT_RESULT, "SUCCEEDED"):
        return Decision(Step.ATTACH, f"{name}-{last}")
    return Decision(Step.SUBMIT, f"{name}-{last + 1}")


def job_environment(
    inherited: Mapping[str, str], given: Sequence[str], *, workers: Mapping[str, str]
) -> dict[str, str]:
    """Return the variables that go with a job: those of `workers`, of `TRAVELLING`, and those given by name.

    Args:
        inherited: this machine's environment. It is never sent as a whole.
        given: NAME=VALUE, or NAME for the value it has here.
        workers: what every worker process of a run gets.

    Raises:
        UsageError: if a variable is no variable, is not set here, or holds a secret; its value is not repeated.
    """
    chosen = {**workers, **{name: inherited[name] for name in TRAVELLING if inherited.get(name)}}
    for text in given:
        name, separator, value = text.partition("=")
        if not _VARIABLE.fullmatch(name):
            raise UsageError(f"expected NAME=VALUE or NAME for --env, found {name!r}")
        if not separator and name not in inherited:
            raise UsageError(f"expected {name} to be set on this machine (--env {name}), found it unset: give a value")
        chosen[name] = value if separator else inherited[name]
    for name, value in chosen.items():
        if is_secret_name(name) or holds_secret(value):
            raise UsageError(
                f"expected no secret among the variables of a job, found {name}: whoever may list jobs could read it; "
                f"{where_it_belongs(name)}"
            )
    return chosen


def travelling_path(file: Path, working_dir: Path) -> str:
    """Return the path of a file in the copy of the working folder that a job works in.

    Raises:
        UsageError: if there is no such folder or the file lies elsewhere.
    """
    if not working_dir.is_dir():
        raise UsageError(f"expected a folder for --working-dir, found none at {working_dir}")
    try:
        return file.resolve().relative_to(working_dir.resolve()).as_posix()
    except ValueError as error:
        raise UsageError(
            f"expected the config below --working-dir {working_dir}, which travels to the cluster, found {file}: copy "
            "it there, or name another folder"
        ) from error


def latest_attempt(wanted: str, jobs: Iterable[Any]) -> str:
    """Return the submission id that `wanted` means: itself, or the last attempt at the job of that name.

    Raises:
        UsageError: if the cluster knows no such job.
    """
    ids = [job.submission_id for job in jobs if job.submission_id]
    if wanted in ids:
        return wanted
    attempts = [attempt for job in ids if (attempt := attempt_of(wanted, job)) is not None]
    if not attempts:
        known = ", ".join(ids[:5]) if ids else "none"
        raise UsageError(f"expected a job that the cluster knows, found {wanted!r}; known: {known}")
    return f"{wanted}-{max(attempts)}"
