"""The pre-check on a cluster whose worker really cannot use the store: a node with mounts of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.heads import RAY, Head, head_with_token
from tests.cluster.hosts import what_is_missing
from tests.ray.smoke_place import PATIENCE, ROOT, SMOKE, wait_for

MISSING = what_is_missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
READ_ONLY = "mount --bind {store} {store} && mount -o remount,bind,ro {store}"
ANOTHER = "mount -t tmpfs -o size=1m tmpfs {store}"
SECONDS = 60
"""A driver starts, and a worker on the node."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """One that takes no work itself, as the shipped heads."""
    with head_with_token(tmp_path_factory.mktemp("head"), num_cpus=0) as found:
        yield found


@contextlib.contextmanager
def node_with_mounts(head: Head, mounts: str) -> Iterator[None]:
    """A worker node in a mount namespace of its own, which nobody else sees; gone at the end."""
    join = f"{RAY} start --address=127.0.0.1:{head.gcs_port} --num-cpus=2 --object-store-memory=100000000 --block"
    node = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "bash", "-ec", f"{mounts}\nexec {join}"],
        env=head.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert wait_for(lambda: node.poll() is not None or count_workers(head) == 1, seconds=60), "no node joined"
        assert node.poll() is None, f"the node ended with {node.returncode}"
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGTERM)
        node.wait(timeout=60 * PATIENCE)
        assert wait_for(lambda: count_workers(head) == 0, seconds=60)


def count_workers(head: Head) -> int:
    """Nodes that are alive and bring the CPUs of a worker."""
    listed = subprocess.run(
        [RAY, "list", "nodes", "--address", head.address, "--filter", "state=ALIVE", "--format", "yaml"],
        env=head.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return len(re.findall(r"\bCPU: 2\.0", listed.stdout))


def check(head: Head, store: Path) -> subprocess.CompletedProcess[str]:
    """`safetydpo doctor` on the smoke config with this store, joined from the head."""
    settings = [f"store={store}", f"run_dir={store}-run", "execution.num_workers=1"]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "ray_jobs.cli",
            "doctor",
            str(SMOKE),
            *settings,
            "--address",
            f"127.0.0.1:{head.gcs_port}",
        ],
        cwd=ROOT,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=240 * PATIENCE,
        check=False,
    )


@pytest.mark.parametrize(
    ("mounts", "found"),
    [
        pytest.param(READ_ONLY, r".*Read-only file system", id="read_only"),
        pytest.param(ANOTHER, "what the driver has just written is not there; use an s3:// address", id="not_shared"),
    ],
)
def test_a_worker_that_cannot_use_the_store_is_told_in_seconds(head: Head, tmp_path: Path, mounts: str, found: str):
    """The same store is written by the driver a moment before, and afterwards nothing is left in it."""
    store = tmp_path / "store"
    store.mkdir()
    with node_with_mounts(head, mounts.format(store=store)):
        started = time.time()
        told = check(head, store)
        took = time.time() - started
    assert told.returncode == 1, told.stdout + told.stderr
    refusal = rf"expected node [\d.]+ to read and write the store {re.escape(str(store))} \(execution\.store\), found: "
    assert re.search(refusal + found, told.stderr), told.stdout + told.stderr
    assert took < SECONDS * PATIENCE
    assert list(store.iterdir()) == []


def test_a_worker_that_can_is_fine(head: Head, tmp_path: Path):
    """With the same mounts of its own, but for the store."""
    store = tmp_path / "store"
    store.mkdir()
    with node_with_mounts(head, "true"):
        told = check(head, store)
    assert told.returncode == 0, told.stdout + told.stderr
