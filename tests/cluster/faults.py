"""Faults of a cluster of hosts, each at a moment that the store tells of."""

from __future__ import annotations

import contextlib
import subprocess
import time

import psutil

from safetydpo.artifacts.storage import Location
from tests.cluster.hosts import Host
from tests.cluster.rehearsal import Rehearsal
from tests.ray.smoke_place import wait_for

GONE_SECONDS = 20


def reach(process: subprocess.Popen[str], store: Location, pattern: str, *, seconds: float = 400) -> None:
    """Wait until a file whose path holds all words of the pattern stands in the store."""
    folder, *words = pattern.split()

    def is_there() -> bool:
        with contextlib.suppress(OSError):
            return any(all(word in file.path for word in words) for file in (store / folder).walk())
        return False

    assert wait_for(lambda: is_there() or process.poll() is not None, seconds=seconds), f"no {pattern} in time"
    assert process.poll() is None, process.communicate()[0][-4000:]


def kill_one(hosts: list[Host], *words: str) -> str:
    """SIGKILL the busiest process whose command line holds one of the words; return its line."""
    assert wait_for(lambda: any(host.find(*words) for host in hosts), seconds=60), f"no process of {words}"
    victim = max((process for host in hosts for process in host.find(*words)), key=_worked)
    line = " ".join(victim.cmdline())
    victim.kill()
    return line


def cut_for(host: Host, cluster: Rehearsal) -> None:
    """Cut a host off the network until the cluster has given it up, and see it alive again afterwards."""
    host.cut()
    began = time.time()
    assert wait_for(lambda: cluster.alive() == 2, seconds=60), f"{cluster.alive()} nodes though one was cut off"
    time.sleep(max(0.0, GONE_SECONDS - (time.time() - began)))
    host.join()
    assert wait_for(lambda: cluster.alive() == 3, seconds=120), f"{cluster.alive()} nodes"


def busiest(hosts: list[Host], *words: str) -> Host:
    """Return the host on which such processes have worked most; there must be one."""
    assert wait_for(lambda: any(host.find(*words) for host in hosts), seconds=60), f"no process of {words}"
    return max(hosts, key=lambda host: sum(_worked(process) for process in host.find(*words)))


def _worked(process: psutil.Process) -> float:
    """CPU seconds of a process; one that has just ended did nothing."""
    with contextlib.suppress(psutil.Error):
        return float(process.cpu_times().user)
    return 0.0
