"""A Ray head on loopback, which may ask for a token as a cluster would."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ports import free_ports
from tests.ray.smoke_place import PATIENCE, ROOT, wait_for

BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")
TOKEN = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class Head:
    """Where it answers, and the environment of a client that may ask it."""

    address: str
    environment: dict[str, str]
    place: Path
    """Ray's own folder, with the logs of its sessions."""
    gcs_port: int
    agent_port: int
    client_port: int

    def safetydpo(self, *arguments: str, seconds: float = 240, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run `safetydpo ARGUMENTS --address …` to its end, from the checkout."""
        return subprocess.run(
            [sys.executable, "-m", "ray_jobs.cli", *arguments, "--address", self.address],
            cwd=ROOT,
            env={**self.environment, **changes},
            capture_output=True,
            text=True,
            timeout=seconds * PATIENCE,
            check=False,
        )


@contextlib.contextmanager
def head_with_token(
    folder: Path, *, num_cpus: int = 8, options: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Iterator[Head]:
    """`ray start --head` with token authentication; ended with its whole process group.

    `options` go to `ray start`, `variables` into the environment of everything that it starts.
    """
    token = folder / "auth_token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    environment = {
        **os.environ,
        # A job's command is `python -m …`, as it stands on the PATH of the head.
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        **(variables or {}),
    }
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "PYTHONPATH"):
        environment.pop(name, None)
    with ray_head(environment, num_cpus=num_cpus, options=options) as head:
        yield head


@contextlib.contextmanager
def ray_head(environment: Mapping[str, str], *, num_cpus: int = 8, options: Sequence[str] = ()) -> Iterator[Head]:
    """`ray start --head` on loopback in this environment, ready to take jobs; ended with its whole process group."""
    environment = {**environment, "RAY_USAGE_STATS_ENABLED": "0"}
    port, dashboard, agent, client = free_ports(4)
    # A job finds its cluster by a file in Ray's folder, where the last Ray that was started on the machine is written:
    # another test's. Short, because paths of sockets must be.
    place = tempfile.mkdtemp(prefix="rh", dir="/tmp")
    start = [RAY, "start", "--head", f"--num-cpus={num_cpus}", f"--port={port}", f"--dashboard-port={dashboard}"]
    start += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--disable-usage-stats"]
    start += ["--dashboard-host=127.0.0.1", "--object-store-memory=400000000", "--block", f"--temp-dir={place}"]
    start += options
    head = subprocess.Popen(
        start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    found = Head(f"http://127.0.0.1:{dashboard}", environment, Path(place), port, agent, client)

    def answers() -> bool:
        # The agent, which starts the jobs, comes seconds after the dashboard, and not at all if its port was taken.
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{agent}/api/healthz", timeout=5).close()
            listed = [RAY, "job", "list", "--address", found.address]
            return subprocess.run(listed, env=environment, capture_output=True, check=False).returncode == 0
        return False

    try:
        assert wait_for(lambda: head.poll() is not None or answers(), seconds=90), "the head takes no jobs"
        assert head.poll() is None, f"ray start ended with {head.returncode}"
        yield found
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=60 * PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            pytest.fail("the head did not end on SIGTERM")
        finally:
            shutil.rmtree(place, ignore_errors=True)
