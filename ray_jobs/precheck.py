"""Is what a run asks of a cluster possible: told in seconds, with the reason, instead of pending for ever."""

from __future__ import annotations

import platform
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import safetydpo
from ray_jobs.precheck_room import check_fit, read_room
from ray_jobs.resources import most_workers
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError, UsageError

PROBE_SECONDS = 120.0
"""A worker process starts within seconds, after its node has fetched the job's files."""
FOLDER = ".precheck-"
"""In the store, a check's own number behind it; hidden from every listing of ours."""
WRITTEN_BY_DRIVER = "driver"
_MISMATCH = "Version mismatch"


@dataclass(frozen=True)
class Answer:
    """What a worker process on one node says."""

    node: str
    versions: Mapping[str, str]
    problem: str = ""
    """Why it cannot use the store; empty = it can, or was not asked."""


def explain_mismatch(error: RuntimeError) -> SafetyDPOError | None:
    """Return what Ray's refusal to join a cluster of other versions means in one line; None if it is another error."""
    if _MISMATCH not in str(error):
        return None
    found = " ".join(str(error).split())
    return UsageError(
        f"expected the cluster's versions of Ray and Python on this machine, found: {found[:300]}; install those here"
    )


def versions_here() -> dict[str, str]:
    """Return the versions of this process that must be the same on every node; Python's without its last number."""
    return {
        "ray": ray.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        # Of the code that runs, which a job may have brought along, not of what is installed.
        "safetydpo": safetydpo.__version__,
    }


def check_cluster(
    config: Config, *, with_store: bool = True, expected: Mapping[str, str] | None = None
) -> list[Answer]:
    """Ask a worker process on every node for its versions, and whether it can use the store; return the answers.

    Args:
        config: what is asked for.
        with_store: whether `execution.store` is tried; it must lie where all nodes see it.
        expected: versions to be found; None = this process's.

    Raises:
        UsageError: if a process fits on no node, versions differ, or the store is not shared.
        SafetyDPOError: if a node does not answer or cannot write to the store.
    """
    check_fit(config.execution, read_room(config.execution))
    # A folder of its own: another run may look at the same store at the same moment.
    folder = open_location(config.execution.store) / f"{FOLDER}{uuid.uuid4().hex}" if with_store else None
    if folder is not None:
        (folder / WRITTEN_BY_DRIVER).write_bytes(b"x")
    try:
        answers = _ask_nodes(folder)
        check_versions(answers, expected or versions_here())
        for answer in answers:
            if answer.problem:
                raise SafetyDPOError(
                    f"expected node {answer.node} to read and write the store {config.execution.store} "
                    f"(execution.store), found: {answer.problem}"
                )
    finally:
        if folder is not None:
            folder.delete()
    return answers


def check_versions(answers: Sequence[Answer], expected: Mapping[str, str]) -> None:
    """See that every node has the expected versions.

    Raises:
        UsageError: naming the first that differs, and where.
    """
    for name, wanted in expected.items():
        others = {answer.node: answer.versions.get(name, "none") for answer in answers}
        wrong = {node: found for node, found in others.items() if found != wanted}
        if wrong:
            node, found = next(iter(wrong.items()))
            more = f" and on {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise UsageError(
                f"expected {name} {wanted} on every node, as where this was started, found {found} on {node}{more}: "
                "install the same versions everywhere (one image, one wheel)"
            )


def _ask_nodes(folder: Location | None) -> list[Answer]:
    asked: dict[Any, str] = {}
    for node in ray.nodes():
        # A head without CPUs takes no work of a run, whatever it could reach.
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0:
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[_answer.options(scheduling_strategy=pinned).remote(folder)] = node["NodeManagerAddress"]
    answers, waiting, deadline = [], list(asked), time.monotonic() + PROBE_SECONDS
    while waiting:
        # One by one, so that a node which cannot is told at once, not after one that is silent.
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise SafetyDPOError(
                f"expected an answer of node {asked[waiting[0]]} within {PROBE_SECONDS:g} s, found none: look at its "
                "logs, or remove it from the cluster"
            )
        answers.append(_collect(ready[0], node=asked[ready[0]]))
    return answers


def _collect(reference: Any, *, node: str) -> Answer:
    try:
        return Answer(node, *ray.get(reference))
    except Exception as error:  # whatever kept a worker from starting: a missing package, a broken environment
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise SafetyDPOError(
            f"expected a worker on node {node} that starts and imports safetydpo, found: {last[0][:300]}; install the "
            "same image and wheel on every node"
        ) from error


@ray.remote(num_cpus=0, max_retries=0)
def _answer(folder: Location | None) -> tuple[dict[str, str], str]:
    return versions_here(), "" if folder is None else try_folder(folder)


def try_folder(folder: Location) -> str:
    """Look for what the driver wrote, write and delete a file of one's own; return what is wrong, or nothing."""
    try:
        if not (folder / WRITTEN_BY_DRIVER).is_file():
            return (
                "what the driver has just written is not there; use an s3:// address or a folder that all nodes share"
            )
        own = folder / uuid.uuid4().hex
        own.write_bytes(b"x")
        own.delete()
    except SafetyDPOError as error:
        return str(error)
    return ""


def describe(config: Config, answers: Sequence[Answer], *, with_store: bool) -> list[str]:
    """Return one line per check that has passed."""
    execution = config.execution
    room, workers = read_room(execution), most_workers(execution)
    found = ", ".join(f"{name} {number}" for name, number in versions_here().items())
    asked = {
        name: workers * each for name, each in (("CPU", execution.cpus_per_worker), ("GPU", execution.gpus_per_worker))
    }
    lines = [f"ok  versions: {found} on {len(answers)} nodes that take work"]
    for name, amount in asked.items():
        now, most = room.has(name), room.most(name)
        later = f", {most:g} at most with the autoscaler" if most > now else ""
        lines.append(f"ok  {name}s: {amount:g} asked for by execution.num_workers, {now:g} there{later}")
    if with_store:
        lines.append(f"ok  store {config.execution.store}: written, read and deleted from every node")
    return lines
