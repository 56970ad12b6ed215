"""A real head with a token: without it nobody gets anything, and what a run leaves behind holds no secret."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.cluster.heads import RAY, TOKEN, Head, head_with_token
from tests.cluster.job_records import runtime_environment
from tests.cluster.test_jobs_slow import SHORT, run_of
from tests.ray.smoke_place import PATIENCE, wait_for
from tests.security.dashboard_routes import AGENT, HEAD, filled, list_routes

pytestmark = pytest.mark.slow
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAMARKED1111111111",
    "AWS_SECRET_ACCESS_KEY": "marked2222222222222222222222222222222222",
    "AWS_SESSION_TOKEN": "marked3333333333333333333333",
    "OPENAI_API_KEY": "sk-marked44444444444444444444",
    "SAFETYDPO_WRITER_KEY": "marked555555555555555555555555",
    "HF_TOKEN": "hf_marked666666666666666666",
    "WANDB_API_KEY": "marked77777777777777777777777777777777",
}
"""In the environment of the node and of whoever submits."""
ROUTES = list_routes()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """One whose client server is up: Ray gives it 30 seconds, and ends with it, which a busy machine may exceed."""
    for _ in range(3):
        with head_with_token(tmp_path_factory.mktemp("head"), variables=SECRETS) as found:
            if wait_for(lambda ports=(found.client_port, found.agent_port): all(map(_listens, ports)), seconds=60):
                yield found
                return
    pytest.fail("no head came up whole")


def ask(port: int, method: str, path: str, token: str | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30 * PATIENCE)
    try:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        connection.request(method, path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def port_of(head: Head, part: str) -> int:
    return int(str(urlsplit(head.address).port)) if part == HEAD else head.agent_port


def _listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def documented(root: Path, part: str) -> set[tuple[str, str]]:
    """The list in docs/cluster.md."""
    text = (root / "docs" / "cluster.md").read_text()
    (line,) = re.findall(rf"^- \*\*Without a token answers the {part}\*\*: (.*(?:\n  .*)*)", text, re.MULTILINE)
    return {(method, path) for method, path in re.findall(r"`(GET|POST|PUT|DELETE) (\S+)`", line)}


@pytest.mark.parametrize("part", [HEAD, AGENT])
def test_what_answers_without_a_token_is_what_the_docs_say(head: Head, root: Path, part: str):
    """Every route of the installed Ray is asked; a token that is wrong opens no more than none."""
    assert len(ROUTES[part]) > (60 if part == HEAD else 5)
    port = port_of(head, part)
    for token, refusal in ((None, 401), ("f" * 32, 403)):
        answers = {(method, path): ask(port, method, filled(path), token) for method, path in ROUTES[part]}
        opened = {route for route, status in answers.items() if status != refusal}
        # Takes a token itself, to put it into a cookie.
        assert answers.get(("POST", "/api/authenticate"), refusal) == refusal
        assert opened == documented(root, part)


def test_the_token_opens_what_is_closed(head: Head):
    assert ask(port_of(head, HEAD), "GET", "/api/jobs/", TOKEN) == 200
    assert ask(port_of(head, HEAD), "GET", "/api/v0/nodes", TOKEN) == 200


def test_paths_that_climb_are_refused(head: Head):
    port = port_of(head, HEAD)
    for path in ("/static/../../../../etc/passwd", "/static/..%2f..%2fetc/passwd", "/logs/../x", "//api/jobs/"):
        assert ask(port, "GET", path) in (401, 403, 404)


def test_the_dashboard_is_closed_to_every_other_address(head: Head):
    others = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family is socket.AF_INET and not address.address.startswith("127.")
    ]
    for host in ["127.0.0.2", *others]:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port_of(head, HEAD)), timeout=10)


def test_nobody_joins_or_drives_it_without_the_token(head: Head, tmp_path: Path):
    """Five at once, because each waits: two drivers, two clients, and a node that would be a worker."""
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 32)
    none = {**head.environment, "RAY_AUTH_MODE": "disabled"}
    none.pop("RAY_AUTH_TOKEN_PATH")
    other = {**head.environment, "RAY_AUTH_TOKEN_PATH": str(wrong)}
    code = "import ray, sys; ray.init(sys.argv[1]); print('in', len(ray.nodes()))"
    gcs, client = f"127.0.0.1:{head.gcs_port}", f"ray://127.0.0.1:{head.client_port}"
    place = tmp_path / "r"
    attempts = [
        ([sys.executable, "-c", code, address], variables) for address in (gcs, client) for variables in (none, other)
    ]
    attempts.append(([RAY, "start", f"--address={gcs}", f"--temp-dir={place}", "--block"], none))
    started = [
        subprocess.Popen(
            command,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command, variables in attempts
    ]
    wait_for(lambda: all(process.poll() is not None for process in started), seconds=75)
    for process in started:
        # What still waits is no further in.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert not re.search(r"^in \d", process.communicate()[0], re.MULTILINE)
        assert process.returncode != 0
    assert ask(port_of(head, HEAD), "GET", "/api/v0/nodes", TOKEN) == 200
    assert count_nodes(head) == 1


def count_nodes(head: Head) -> int:
    """Nodes of the cluster, dead ones too, as the dashboard tells who has the token."""
    request = urllib.request.Request(f"{head.address}/api/v0/nodes", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=30 * PATIENCE) as answer:
        return int(json.load(answer)["data"]["result"]["total"])


def _files_with(folder: Path, text: str) -> list[str]:
    return [
        str(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes()
    ]


def test_nothing_that_a_run_leaves_behind_holds_a_secret(head: Head, tmp_path: Path):
    """A job with pictures, judges and a store; then the store, the run folder, Ray's session folder and its records."""
    command = ["submit", *run_of(tmp_path, *SHORT), "--stage", "pairs", "--wait"]
    done = head.safetydpo(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    name = done.stdout.splitlines()[0].removeprefix("sent ")
    refused = head.safetydpo(*command, "--again", "--env", "OPENAI_API_KEY")
    assert refused.returncode == 2
    listed = subprocess.run(
        [RAY, "job", "list", "--address", head.address],
        env=head.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    told = {
        "submit": done.stdout + done.stderr,
        "refusal": refused.stdout + refused.stderr,
        "job list": listed.stdout + listed.stderr,
        "job record": runtime_environment(head, name),
        "logs": head.safetydpo("logs", name).stdout,
        "status": head.safetydpo("status", name).stdout,
    }
    assert list((tmp_path / "store").rglob("record.json"))
    assert list(head.place.rglob("*.log"))
    for variable, secret in {**SECRETS, "the token": TOKEN}.items():
        assert not [where for where, text in told.items() if secret in text], variable
        for folder in (tmp_path / "store", tmp_path / "run", head.place):
            assert not _files_with(folder, secret), variable
