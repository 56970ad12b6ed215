"""Connect to Ray, check that what is asked can be had, and leave nothing behind."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from safetydpo.config.schema import Config, ExecutionConfig
from safetydpo.errors import UsageError

OBJECT_STORE_BYTES = 400_000_000
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


def connect(config: Config) -> None:
    """Join the job's cluster or the configured one, else start a local Ray; a second call does nothing.

    Raises:
        UsageError: if the cluster can never give what `execution` asks for.
    """
    if not ray.is_initialized():
        _initialise(config)
    check_resources(config.execution)


def _initialise(config: Config) -> None:
    execution = config.execution
    environment = dict(_WORKER_ENVIRONMENT)
    if execution.gpus_per_worker > 0:
        environment.pop("DS_ACCELERATOR")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Ray warns when more worker processes start than it has cores; here most of them wait for their turn.
    os.environ.setdefault("RAY_maximum_startup_concurrency", "16")
    runtime_env = {"env_vars": environment}
    namespace = f"safetydpo-{config.name}"
    quiet = logging.ERROR
    if not os.environ.get("SAFETYDPO_WORKER_LOGS"):
        for name in ("ray.data", "ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(quiet)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        # Inside a job a runtime_env of ours would conflict with the one of the submission.
        os.environ.update(environment)
        ray.init(namespace=namespace, logging_level=quiet, log_to_driver=False)
    elif execution.ray_address:
        ray.init(
            address=execution.ray_address,
            namespace=namespace,
            runtime_env=runtime_env,
            logging_level=quiet,
            log_to_driver=False,
        )
    else:
        ray.init(
            address="local",
            num_cpus=execution.logical_cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            namespace=namespace,
            runtime_env=runtime_env,
            logging_level=quiet,
            log_to_driver=bool(os.environ.get("SAFETYDPO_WORKER_LOGS")),
        )


def check_resources(execution: ExecutionConfig) -> None:
    """Compare what all workers together ask for with what the cluster has.

    Raises:
        UsageError: expected, found, what to do.
    """
    total = ray.cluster_resources()
    for resource, per_worker, setting in (
        ("CPU", execution.cpus_per_worker, "cpus_per_worker"),
        ("GPU", execution.gpus_per_worker, "gpus_per_worker"),
    ):
        needed = per_worker * execution.num_workers
        found = total.get(resource, 0.0)
        if needed > found:
            raise UsageError(
                f"expected {needed:g} {resource}s (execution.num_workers {execution.num_workers} x "
                f"execution.{setting} {per_worker:g}), found {found:g} in the cluster: lower either, or add nodes"
            )


def disconnect() -> None:
    """End this process's connection; a local Ray that it started ends with it."""
    if ray.is_initialized():
        ray.shutdown()


@contextmanager
def ray_state_folder() -> Iterator[str]:
    """Yield a folder for Ray's own state that no later run reads; it is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="safetydpo-ray-") as folder:
        yield folder
