"""Every port of a head is found and asked without a token: what answers is what docs/cluster.md lists, no more."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.cluster.heads import Head, head_with_token
from tests.ports import free_ports
from tests.ray.smoke_place import wait_for
from tests.security.listening_ports import REFUSED, Port, ask_by_grpc, ask_by_http, listening_ports, processes_of

pytestmark = pytest.mark.slow
DRIVER = """
import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=0)
class Held:
    def answer(self):
        return 1
held = Held.remote()
print("in", ray.get(held.answer.remote()), flush=True)
time.sleep(600)
"""
"""A driver and a worker: they listen too."""
KINDS = {"gcs_server", "raylet", "dashboard", "monitor", "client.server", "worker", "driver"}
KINDS |= {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Its ports of metrics are its own: another Ray of this machine may hold those that Ray would take."""
    monitor, dashboard = free_ports(2)
    variables = {"AUTOSCALER_METRIC_PORT": str(monitor), "DASHBOARD_METRIC_PORT": str(dashboard)}
    with head_with_token(tmp_path_factory.mktemp("head"), variables=variables) as found:
        yield found


@pytest.fixture(scope="module")
def ports(head: Head) -> Iterator[list[Port]]:
    """Those of every process of the head, of a driver and of its worker, once each kind listens."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, f"127.0.0.1:{head.gcs_port}"],
        env=head.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "in 1\n"
        wait_for(lambda: {port.process for port in _all_ports(head, driver)} >= KINDS, seconds=60)
        yield _all_ports(head, driver)
    finally:
        driver.kill()
        driver.communicate()


def _all_ports(head: Head, driver: subprocess.Popen[str]) -> list[Port]:
    (first,) = [one for one in psutil.process_iter(["cmdline"]) if _is_start_of(head, one.info["cmdline"] or [])]
    own = [Port("driver", port.address, port.number) for port in listening_ports(processes_of(driver.pid))]
    return [*listening_ports(processes_of(first.pid)), *own]


def _is_start_of(head: Head, command: list[str]) -> bool:
    return command[2:4] == ["start", "--head"] and f"--temp-dir={head.place}" in command


def documented(root: Path, what: str) -> set[str]:
    """The names in the list of docs/cluster.md that begins so."""
    text = (root / "docs" / "cluster.md").read_text()
    (line,) = re.findall(rf"^- \*\*Without a token {re.escape(what)}\*\*: (.*(?:\n  .*)*)", text, re.MULTILINE)
    return set(re.findall(r"`([^`]+)`", line))


def test_every_kind_of_process_was_found(ports: list[Port]):
    assert {port.process for port in ports} == KINDS


def test_pages_without_a_token_are_those_of_the_docs(head: Head, root: Path, ports: list[Port]):
    """The dashboard's and the agent's own ports are asked for every route in test_token_slow."""
    own = {int(str(urlsplit(head.address).port)), head.agent_port}
    assert own <= {port.number for port in ports}
    opened = set()
    for port in ports:
        for path in ("/", "/metrics", "/any/other"):
            answer = ask_by_http(port, path)
            if answer is None or port.number in own:
                continue
            if answer[0] == 200:
                assert b"# TYPE " in answer[1], port
                opened.add(port.process)
            else:
                assert answer[0] == 401, (port, path)
    assert opened == documented(root, "answers Prometheus")


def test_calls_without_a_token_are_those_of_the_docs(root: Path, ports: list[Port]):
    """Every call of the installed Ray is sent to every port; one that speaks neither HTTP nor gRPC would be new."""
    opened: set[str] = set()
    for port in ports:
        statuses = ask_by_grpc(port)
        assert statuses or ask_by_http(port, "/") is not None, port
        open_here = {name for name, status in statuses.items() if status != REFUSED}
        if statuses:
            assert len(statuses) > len(open_here), port
            opened |= {port.process for _ in open_here} | open_here
    assert opened == documented(root, "answers gRPC")
