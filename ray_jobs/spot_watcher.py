"""Drain this node when its machine is about to be taken back: `python -m ray_jobs.spot_watcher aws|gcp HEAD:PORT`.

It asks the cloud's metadata service every few seconds, by Amazon's IMDSv2 (a token first, then `spot/instance-action`)
or Google's `instance/preempted`, and then Ray's hidden `ray drain-node`: no new work comes to the node, and what runs
there is told how long it has. Started by the cluster file beside Ray on each worker.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from safetydpo.errors import SafetyDPOError, UsageError

POLL_SECONDS = 5.0
"""Amazon asks for no more than one look in five seconds, and gives two minutes."""
ANSWER_SECONDS = 2.0
TOKEN_SECONDS = 21600
"""Of IMDSv2, six hours, the longest; a refused token is replaced at once."""
GRACE_SECONDS = {"aws": 120, "gcp": 30}
"""From the notice to the end, where the notice names no time."""
SERVERS = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
DRAIN_TRIES = 3
# A proxy that stands in the environment is another machine, with metadata of its own.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_log = logging.getLogger(__name__)


class Metadata:
    """The metadata service of one machine."""

    def __init__(self, cloud: str, server: str) -> None:
        """Look at `server`, such as http://169.254.169.254, as `cloud` (aws or gcp) does."""
        self._cloud, self._server = cloud, server.rstrip("/")
        self._token = ""

    def seconds_left(self) -> float | None:
        """Return how long this machine still has; None = nothing is planned, as far as the service says.

        Raises:
            OSError: if the service does not answer.
        """
        return self._google() if self._cloud == "gcp" else self._amazon()

    def _google(self) -> float | None:
        answer = self._get("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        return float(GRACE_SECONDS["gcp"]) if answer.strip().upper() == "TRUE" else None

    def _amazon(self) -> float | None:
        for _ in range(2):
            if not self._token:
                asked = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
                self._token = self._get("/latest/api/token", asked, method="PUT")
            try:
                answer = self._get("/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": self._token})
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401:
                    raise
                # The token has run out.
                self._token = ""
                continue
            return _seconds_until(answer)
        return None

    def _get(self, path: str, headers: Mapping[str, str], *, method: str = "GET") -> str:
        request = urllib.request.Request(self._server + path, headers=dict(headers), method=method)
        with _DIRECT.open(request, timeout=ANSWER_SECONDS) as answer:
            content: bytes = answer.read(65536)
        return content.decode("utf-8", errors="replace")


def _seconds_until(notice: str) -> float:
    """Return the seconds until the `time` of Amazon's notice; the usual two minutes if that cannot be read."""
    try:
        ends = datetime.strptime(json.loads(notice)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except (ValueError, KeyError, TypeError):
        return float(GRACE_SECONDS["aws"])
    return max(1.0, (ends - datetime.now(UTC)).total_seconds())


def watch(
    metadata: Metadata, drain: Callable[[float], None], *, poll_seconds: float = POLL_SECONDS, looks: int | None = None
) -> bool:
    """Look until a notice comes, then drain; return whether one came (`looks`: give up after so many)."""
    silent = False
    while looks is None or looks > 0:
        looks = None if looks is None else looks - 1
        try:
            left = metadata.seconds_left()
            silent = False
        except OSError as error:
            # Once, not every five seconds: a service that is closed stays so.
            if not silent:
                _log.warning("the metadata service does not answer: %s", error)
            silent, left = True, None
        if left is not None:
            _log.warning("this machine is taken back in %.0f s: its node is drained", left)
            drain(left)
            return True
        time.sleep(poll_seconds)
    return False


def drain_command(address: str, node_id: str, left: float) -> list[str]:
    """Return Ray's command that drains the node within `left` seconds."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the cloud takes this machine back"]
    return [*command, "--deadline-remaining-seconds", str(max(1, int(left))), "--node-id", node_id]


def drain_node(address: str, node_id: str, left: float) -> None:
    """Drain the node, with a second and a third try.

    Raises:
        SafetyDPOError: if Ray refuses.
    """
    for _ in range(DRAIN_TRIES):
        done = subprocess.run(
            drain_command(address, node_id, left), capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode == 0:
            return
        time.sleep(1)
    raise SafetyDPOError(
        f"expected the cluster at {address} to drain node {node_id}, found: "
        f"{' '.join(done.stderr.split())[-300:]}; the node will end without a warning to what runs there"
    )


def find_own_node(address: str) -> str:
    """Return the id of the node on this machine, as the cluster at `address` (HEAD:PORT) knows it.

    Raises:
        SafetyDPOError: if it knows none here.
    """
    import ray
    from ray.util import get_node_ip_address

    here = get_node_ip_address()
    nodes = ray._raylet.GcsClient(address=address).get_all_node_info()
    for node_id, node in nodes.items():
        if node.node_manager_address == here and node.state == 0:
            return str(node_id.hex())
    raise SafetyDPOError(f"expected a node of the cluster at {address} on this machine ({here}), found none: start Ray")


def main(arguments: Sequence[str]) -> int:
    """Watch until a notice comes; print one line on failure."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    try:
        if len(arguments) not in (2, 3, 4) or arguments[0] not in SERVERS:
            raise UsageError("usage: python -m ray_jobs.spot_watcher aws|gcp HEAD:PORT [METADATA_URL [NODE_ID]]")
        cloud, address, *rest = arguments
        node = rest[1] if len(rest) > 1 else find_own_node(address)
        metadata = Metadata(cloud, rest[0] if rest else SERVERS[cloud])
        _log.info("watching over node %s", node)
        watch(metadata, lambda left: drain_node(address, node, left))
    except SafetyDPOError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
