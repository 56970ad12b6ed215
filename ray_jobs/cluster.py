"""Connect to Ray, check that what is asked can be had, and leave nothing behind."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import ray

from ray_jobs.background import is_ray_waited_for
from ray_jobs.resources import most_workers, own_nodes
from ray_jobs.run import run_id
from ray_jobs.run_progress import told_progress
from safetydpo.artifacts.object_store import SECRET_VARIABLES, worker_variables
from safetydpo.config.schema import Config, ExecutionConfig
from safetydpo.errors import UsageError

OBJECT_STORE_BYTES = 400_000_000
LOCAL_STARTS = 3
NO_API_SERVER = "http://127.0.0.1:9"
"""An address that refuses at once. A local Ray has no dashboard, and Ray Train's helper process, looking for one for
40 s, would hold up the end of a short training by 12 s."""
START_TIMEOUT = "timed out during startup"
"""What the message of Ray's exception says; the exception has no class of its own."""
_WORKER_ENVIRONMENT = {
    # One BLAS thread by default; each worker sets torch's own count from execution.cpus_per_worker.
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"),
    "RAY_TRAIN_V2_ENABLED": "1",
    # Large freed tensors are kept for reuse instead of going back to the kernel page by page.
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "DS_ACCELERATOR": "cpu",
}
_DRIVER_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
# For a local Ray only; on a cluster they are whoever started its nodes' to choose. A worker process costs one to
# two seconds of CPU to start, which is most of a small run's time.
_LOCAL_RAY_FLAGS = {
    # Ray would start one process per logical CPU with the first driver, whether they find work or not.
    "RAY_prestart_worker_first_driver": "0",
    # Idle processes end after a second by default, and each dataset then starts new ones.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    # Ray warns when more processes than this are alive; most of ours wait for their turn.
    "RAY_worker_maximum_startup_concurrency": "16",
}
_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the driver of a submitted job."""
SPARE_CPUS = 1
"""CPUs that a pool's actors must leave: Ray Data reads and writes in tasks of their own, and would wait for ever."""


def connect(config: Config, *, probe: bool = True) -> None:
    """Join the job's cluster or the configured one, else start a local Ray; a second call does nothing.

    With `probe`, each node of a cluster is asked for its versions and whether it can use the store; a local Ray is not.

    Raises:
        UsageError: if the cluster can never give what `execution` asks for.
        SafetyDPOError: if a node cannot do its part.
    """
    told = told_progress()
    if told is not None:
        # A stage that finds everything closed never comes here, and tells nothing.
        told.tell()
    joined = not ray.is_initialized()
    if joined:
        _initialise(config)
    check_resources(config.execution, num_workers=most_workers(config.execution), spare_cpus=SPARE_CPUS)
    if needs_distillation(config):
        # Asked for at the end of hours of training; said at their beginning.
        processes = config.identity.merge.distill.processes
        _check_cap(config.execution, processes=processes)
        check_resources(config.execution, num_workers=processes, setting="identity.merge.distill.processes")
    if joined and probe and joins_cluster(config.execution):
        from ray_jobs.precheck import check_cluster

        check_cluster(config)


def joins_cluster(execution: ExecutionConfig) -> bool:
    """Return whether a run joins a cluster that is there: as a job on it, or by `execution.ray_address`."""
    return _IN_A_JOB in os.environ or execution.ray_address is not None


def worker_environment(execution: ExecutionConfig) -> dict[str, str]:
    """Return the variables of every worker process of a run."""
    environment = {**_WORKER_ENVIRONMENT, **worker_variables()}
    if execution.gpus_per_worker > 0:
        environment.pop("DS_ACCELERATOR")
    return environment


def needs_distillation(config: Config) -> bool:
    """Return whether a merge method of the run, or one that its search may choose, is a distillation."""
    from safetydpo.merging.registry import find_method

    identity = config.identity
    return any(find_method(name).needs_distilled for name in (*identity.merge.methods, *identity.search.methods))


def _initialise(config: Config) -> None:
    execution = config.execution
    environment = worker_environment(execution)
    for name, value in _DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet = logging.ERROR
    if not os.environ.get("SAFETYDPO_WORKER_LOGS"):
        _keep_off_the_screen()
    common: dict[str, Any] = {
        "namespace": f"safetydpo-{run_id(config)}",
        "logging_level": quiet,
        "log_to_driver": False,
    }
    if _IN_A_JOB in os.environ:
        # Inside a job a runtime_env of ours would conflict with the one of the submission.
        os.environ.update(environment)
        ray.init(**common)
    elif execution.ray_address:
        _join(execution.ray_address, environment, common)
    else:
        common["log_to_driver"] = bool(os.environ.get("SAFETYDPO_WORKER_LOGS"))
        # The processes of a local Ray inherit this one's environment; a runtime_env would keep apart those that
        # have it from those that do not, and start more of them.
        flags = {name: os.environ.get(name, value) for name, value in _LOCAL_RAY_FLAGS.items()}
        with _environment({**flags, **environment, "RAY_API_SERVER_ADDRESS": NO_API_SERVER}):
            _start_local(execution.logical_cpus, common)


def _join(address: str, environment: Mapping[str, str], common: Mapping[str, Any]) -> None:
    from ray_jobs.precheck import explain_mismatch
    from ray_jobs.precheck_token import check_token

    check_token()
    try:
        ray.init(address=address, runtime_env={"env_vars": dict(environment)}, **common)
    except RuntimeError as error:
        told = explain_mismatch(error)
        if told is None:
            raise
        raise told from error


def _start_local(num_cpus: int, common: Mapping[str, Any]) -> None:
    for attempts_left in reversed(range(LOCAL_STARTS)):
        try:
            with nullcontext() if os.environ.get("SAFETYDPO_WORKER_LOGS") else _stderr_away():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    **common,
                )
            return
        except Exception as error:
            # Ray gives its own processes 30 s to come up, too little on a machine whose cores are all taken.
            if START_TIMEOUT not in str(error) or not attempts_left:
                raise
            ray.shutdown()


def _keep_off_the_screen() -> None:
    # Ray's C++ parts warn at every pool about arguments that this project keeps alive; --debug shows all of it.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # The command tells an error once, in one line; Ray Data's log file keeps the whole of it.
    silent = logging.CRITICAL + 1
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(silent)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(silent)


@contextmanager
def _stderr_away() -> Iterator[None]:
    # Ray's C++ part prints, past Python, that it has read the log level; what a user reads starts with our own lines.
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def check_resources(
    execution: ExecutionConfig, *, num_workers: int, setting: str = "execution.num_workers", spare_cpus: int = 0
) -> None:
    """Compare what `num_workers` (the value of `setting`) ask for together with what the cluster has.

    `spare_cpus` must be left over beside them.

    Raises:
        UsageError: expected, found, what to do.
    """
    total = _resources_of(execution)
    for resource, per_worker, name in (
        ("CPU", execution.cpus_per_worker, "cpus_per_worker"),
        ("GPU", execution.gpus_per_worker, "gpus_per_worker"),
    ):
        spare = spare_cpus if resource == "CPU" else 0
        needed = per_worker * num_workers + spare
        found = total.get(resource, 0.0)
        if needed > found:
            most = _most(execution, resource, found)
            if needed <= most:
                logging.getLogger(__name__).info(
                    "%g %ss wait for the autoscaler, %g are there", needed, resource, found
                )
                continue
            later = f", at most {most:g} with its autoscaler" if most > found else ""
            rest = f", and {spare} that reads and writes" if spare else ""
            where = f" on nodes of execution.label_selector {shown}" if (shown := _shown(execution)) else ""
            raise UsageError(
                f"expected {needed:g} {resource}s ({setting} {num_workers} x execution.{name} {per_worker:g}{rest}), "
                f"found {found:g} in the cluster{where}{later}: lower either, or add nodes"
            )


def _check_cap(execution: ExecutionConfig, *, processes: int) -> None:
    needed = processes * execution.gpus_per_worker
    caps = [cap for cap in (execution.max_gpus, execution.stage_max_gpus.get("merge")) if cap is not None]
    if caps and needed > min(caps):
        raise UsageError(
            f"expected at most {min(caps):g} GPUs (execution.max_gpus, stage_max_gpus.merge), found "
            f"identity.merge.distill.processes {processes} x execution.gpus_per_worker {execution.gpus_per_worker:g}: "
            "raise the limit, or lower gpus_per_worker"
        )


def _resources_of(execution: ExecutionConfig) -> Mapping[str, float]:
    if not execution.label_selector:
        return ray.cluster_resources()
    total: Counter[str] = Counter()
    for node in own_nodes(ray.nodes(), execution):
        total.update(node["Resources"])
    return total


def _shown(execution: ExecutionConfig) -> str:
    return ", ".join(f"{label}={value}" for label, value in execution.label_selector.items())


def _most(execution: ExecutionConfig, resource: str, found: float) -> float:
    if not joins_cluster(execution):
        return found
    from ray_jobs.precheck_room import read_room

    return max(found, read_room(execution).most(resource))


def keep_credentials_from_trials() -> None:
    """Stop Ray Tune from handing this process's S3 credentials to trials: Ray writes into its logs what it hands on.

    Trials find their own, as all other workers do.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(SECRET_VARIABLES)


def disconnect() -> None:
    """End this process's connection; a local Ray that it started ends with it.

    While a thread waits for Ray, that is left to the end of the process; see `background`.
    """
    if ray.is_initialized() and not is_ray_waited_for():
        ray.shutdown()
