"""`safetydpo submit`, `status`, `logs` and `stop`: runs as jobs of a cluster, through a tunnel to its dashboard."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safetydpo.errors import SafetyDPOError, UsageError, visible

if TYPE_CHECKING:
    from ray_jobs.jobs import Jobs

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, mostly the end of a tunnel.", show_default=True
    ),
]
Job = Annotated[str, typer.Argument(help="Submission id, or without its attempt for the last one.", show_default=False)]
LOCAL_DASHBOARD = "http://127.0.0.1:8265"
DOCTOR_SECONDS = 240.0
_WAITING = ("PENDING", "RUNNING")


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="YAML file below --working-dir.", show_default=False)],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, such as store=s3://bucket/store.", show_default=False)
    ] = None,
    address: Address = LOCAL_DASHBOARD,
    working_dir: Annotated[Path, typer.Option(help="Folder that travels (.rayignore says what not).")] = Path("."),
    stage: Annotated[str, typer.Option(help="Last stage; report = all of them.")] = "report",
    env: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, or NAME for its value here; never a secret.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the log until the job ends.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Send it although it has succeeded.")] = False,
) -> None:
    """Run CONFIG as a job of a cluster. Sent twice it is still one job; after a failure it is the next attempt."""
    from ray_jobs.cluster import worker_environment
    from ray_jobs.submit_plan import Step, job_environment, plan_job
    from safetydpo.config.load import load_config

    loaded = load_config(config, settings or [])
    workers = worker_environment(loaded.execution)
    # The nodes know better whether they reach the hub, unless it is set here.
    workers.pop("HF_HUB_OFFLINE", None)
    environment = job_environment(os.environ, env or [], workers=workers)
    plan = plan_job(
        loaded, config, settings or [], stage=stage, working_dir=working_dir.resolve(), environment=environment
    )
    jobs = _connect(address)
    decision = jobs.send(plan, again=again)
    said = {
        Step.SUBMIT: f"sent {decision.submission_id}",
        Step.ATTACH: f"{decision.submission_id} is at work already; nothing was sent",
        Step.NOTHING: f"{decision.submission_id} has succeeded already; nothing was sent (--again sends it once more)",
    }
    print(said[decision.step])
    if decision.step is Step.NOTHING:
        return
    if wait:
        _follow(jobs, decision.submission_id)
    else:
        print(f"safetydpo logs {decision.submission_id} --follow --address {address}")


@app.command()
def status(
    job: Annotated[str | None, typer.Argument(help="Submission id; all jobs if left out.", show_default=False)] = None,
    address: Address = LOCAL_DASHBOARD,
) -> None:
    """Show the jobs of a cluster, or one of them."""
    jobs = _connect(address)
    found = jobs.all() if job is None else [jobs.find(job)]
    if not found:
        print("no job was sent to this cluster")
    for each in found:
        print(visible(_line(each, now=time.time())))
    if job is not None and found[0].message:
        print(visible(_first_words(found[0].message)))


@app.command()
def logs(
    job: Job,
    address: Address = LOCAL_DASHBOARD,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends.")] = False,
) -> None:
    """Show what a job has printed."""
    jobs = _connect(address)
    submission_id = jobs.find(job).submission_id
    if follow:
        _follow(jobs, submission_id)
    else:
        sys.stdout.write(jobs.log(submission_id))


@app.command()
def stop(job: Job, address: Address = LOCAL_DASHBOARD) -> None:
    """Stop a job as Ctrl-C would; the same `submit` goes on from there."""
    jobs = _connect(address)
    found = jobs.find(job)
    if str(found.status) not in _WAITING:
        print(f"{found.submission_id} has ended already: {found.status}")
        return
    print(f"{found.submission_id} {jobs.stop(found.submission_id)}; the same submit goes on from there")


def check_remote_cluster(address: str, config: Path | None, settings: list[str], *, working_dir: Path) -> int:
    """Send the pre-check as a job, print what it says, and return 0 if all is well, else its exit code."""
    from ray_jobs.precheck import versions_here
    from ray_jobs.precheck_command import VERSIONS
    from ray_jobs.submit_plan import JobPlan, job_environment, plan_job, travelling_path
    from safetydpo.config.load import load_config

    arguments = []
    if config is not None:
        loaded = load_config(config, settings)
        plan_job(loaded, config, settings, stage="report", working_dir=working_dir, environment={})
        arguments = [travelling_path(config, working_dir), *settings]
    versions = VERSIONS + json.dumps(versions_here())
    entrypoint = shlex.join(["python", "-m", "ray_jobs.precheck_command", versions, *arguments])
    name = f"safetydpo-doctor-{uuid.uuid4().hex[:8]}"
    # The store is looked for where a run would look for it.
    environment = job_environment(os.environ, [], workers={})
    plan = JobPlan(name, entrypoint, environment, {"stage": "doctor", "run_dir": name}, working_dir.resolve())
    jobs = _connect(address)
    submission_id = jobs.send(plan).submission_id
    try:
        ended = jobs.wait(submission_id, seconds=DOCTOR_SECONDS)
    except (SafetyDPOError, KeyboardInterrupt):
        jobs.stop(submission_id)
        raise
    said = [line for line in jobs.log(submission_id).splitlines() if line.startswith(("ok ", "error: "))]
    print("\n".join(said) or _first_words(jobs.find(submission_id).message or ended))
    return 0 if ended == "SUCCEEDED" else jobs.find(submission_id).driver_exit_code or 1


def _connect(address: str) -> Jobs:
    from ray_jobs.jobs import Jobs
    from ray_jobs.precheck_token import check_token

    check_token()
    return Jobs(address)


def _follow(jobs: Jobs, submission_id: str) -> None:
    jobs.follow(submission_id)
    ended = jobs.wait(submission_id)
    if ended == "SUCCEEDED":
        return
    code = jobs.find(submission_id).driver_exit_code
    kind = UsageError if code == UsageError.exit_code else SafetyDPOError
    raise kind(
        f"expected {submission_id} to succeed, found {ended}"
        + ("" if code is None else f" (exit code {code})")
        + "; its log says why, and the same submit goes on from there"
    )


def _line(job: Any, *, now: float) -> str:
    metadata = job.metadata or {}
    started = (job.start_time or 0) / 1000
    ended = job.end_time / 1000 if job.end_time else now
    where = f"  {metadata['run_dir']}" if "run_dir" in metadata else ""
    return f"{job.submission_id}  {job.status}  {max(0, ended - started):.0f} s{where}"


def _first_words(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]} …"
