"""A cluster of three hosts from the shipped file, jobs on it, and what stands in its S3 store."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from safetydpo.artifacts.storage import Location
from tests.cluster.hosts import S3_ADDRESS, S3_NAMESPACE, SSH_OPTIONS, Hosts, three_hosts
from tests.ports import free_ports
from tests.ray.smoke_place import PATIENCE, ROOT, STAGE_FOLDERS, wait_for
from tests.s3_server import BUCKET, S3Server

LOCAL = ROOT / "configs" / "cluster" / "local.yaml"
NAME = "safetydpo-rehearsal"
RAY = str(Path(sys.executable).parent / "ray")
# A host that is cut off is missed after 3 s of silence, not after a minute (docs/cluster.md).
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
}
POOLS = ("images", "verdicts", "latents", "captions", "outcomes")


def closed_artifacts(store: Location) -> dict[str, str]:
    """Return every closed artifact of all stages: {folder: fingerprint}, and {file: sha256} of adapters."""
    found = {}
    for name in (folder for folders in STAGE_FOLDERS.values() for folder in folders):
        for artifact in (store / name).list():
            if (record := artifact / "record.json").is_file():
                found[f"{name}/{artifact.name}"] = str(json.loads(record.read_bytes())["fingerprint"])
                for file in artifact.walk():
                    if file.path.endswith(".safetensors"):
                        # In which attempt it was made is the faults' business.
                        found[f"{name}/{artifact.name}/{Path(file.path).name}"] = hashlib.sha256(
                            file.read_bytes()
                        ).hexdigest()
    return found


def pool_rows(store: Location) -> dict[str, list[dict[str, Any]]]:
    """Return every row of the closed batches of all pools, sorted: {pool: rows}."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in POOLS:
        for pool in (one for one in (store / name).list() if one.name.startswith("pool-")):
            rows = found.setdefault(f"{name}/{pool.name}", [])
            for batch in pool.list():
                assert (batch / "record.json").is_file(), f"open batch {batch}"
                for file in (batch / "data").walk():
                    with file.open_random_access() as source:
                        rows += pq.ParquetFile(source).read().to_pylist()
    return {pool: sorted(rows, key=lambda row: str(next(iter(row.values())))) for pool, rows in found.items()}


@dataclass
class Rehearsal:
    """The hosts with Ray on them, an S3 server, and a tunnel to the dashboard."""

    hosts: Hosts
    server: S3Server
    port: int = field(default_factory=lambda: free_ports(1)[0])
    tunnel: subprocess.Popen[bytes] | None = None

    @property
    def token(self) -> Path:
        """The cluster's token."""
        return self.hosts.folder / "auth_token"

    @property
    def address(self) -> str:
        """The dashboard, through the tunnel."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def file(self) -> Path:
        """The shipped cluster file, with these hosts' addresses and key and without what needs a network."""
        content = yaml.safe_load(LOCAL.read_text())
        head, *workers = self.hosts.hosts
        content["cluster_name"] = NAME
        content["provider"] |= {"head_ip": head.address, "worker_ips": [host.address for host in workers]}
        content["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.hosts.key)}
        content["file_mounts"] = {"~/.ray/auth_token": str(self.token)}
        content["setup_commands"] = [line for line in content["setup_commands"] if "pip install" not in line]
        memory = "--object-store-memory=300000000"
        for key, given in (
            ("head_start_ray_commands", f"ray start --head --node-ip-address={head.address} {memory}"),
            ("worker_start_ray_commands", f"ray start --num-cpus=4 {memory}"),
        ):
            plain = " ".join(given.split()[: 3 if "head" in key else 2])
            content[key] = [line.replace(plain, given) for line in content[key]]
            assert any(given in line for line in content[key])
        file = self.hosts.folder / "cluster.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return file

    @property
    def environment(self) -> dict[str, str]:
        """The environment of commands on this machine, outside the hosts."""
        ours = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
        return ours | {
            "RAY_UP_enable_autoscaler_v2": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
        }

    def launcher(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `ray ARGUMENTS`."""
        return subprocess.run(
            [RAY, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=180 * PATIENCE,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def up(self) -> None:
        """`ray up`, and wait until all three nodes are there."""
        forget_launcher_files()
        done = self.launcher("up", "-y", "--no-config-cache", "--disable-usage-stats", str(self.file))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        head = self.hosts.hosts[0]
        forward = f"127.0.0.1:{self.port}:127.0.0.1:8265"
        self.tunnel = subprocess.Popen(
            ["ssh", "-N", "-i", str(self.hosts.key), *SSH_OPTIONS, "-L", forward, f"root@{head.address}"],
            stdin=subprocess.DEVNULL,
        )
        assert wait_for(lambda: self.alive() == 3, seconds=120), f"{self.alive()} nodes"

    def alive(self) -> int:
        """Return how many nodes are alive, by the dashboard; a host that came back has a dead row too."""
        request = urllib.request.Request(f"{self.address}/api/v0/nodes?limit=100")
        request.add_header("Authorization", f"Bearer {self.token.read_text()}")
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                rows = json.loads(reply.read())["data"]["result"]["result"]
        except (urllib.error.URLError, OSError):
            return 0
        return sum(row["state"] == "ALIVE" for row in rows)

    def submit(self, *settings: str, stage: str = "report") -> subprocess.Popen[str]:
        """`safetydpo submit configs/smoke.yaml … --wait` from outside the hosts."""
        command = [sys.executable, "-m", "ray_jobs.cli", "submit", "configs/smoke.yaml", *settings, "--stage", stage]
        return subprocess.Popen(
            [*command, "--address", self.address, "--wait"],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def down(self) -> None:
        """`ray down`, then `ray stop` on each worker, which it never contacts; no process of Ray is left."""
        done = self.launcher("down", "-y", str(self.hosts.folder / "cluster.yaml"))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        for host in self.hosts.hosts[1:]:
            stopped = self.hosts.ssh(host, "source ~/.bashrc; ray stop --force", seconds=60)
            assert stopped.returncode == 0, stopped.stderr
        for host in self.hosts.hosts:
            assert wait_for(lambda host=host: not host.find("raylet", "gcs_server", "ray::"), seconds=60)

    def close(self) -> None:
        """End what runs outside the hosts."""
        if self.tunnel is not None:
            self.tunnel.kill()
            self.tunnel.wait()
        forget_launcher_files()


def forget_launcher_files() -> None:
    """Remove what Ray's launcher keeps of this cluster: a stale one means "the head is up already"."""
    for suffix in ("state", "lock"):
        Path(f"/tmp/ray/cluster-{NAME}.{suffix}").unlink(missing_ok=True)


@contextmanager
def rehearsal(variables: Mapping[str, str] | None = None) -> Iterator[Rehearsal]:
    """Hosts and S3 without Ray yet; nothing of them is left at the end."""
    with tempfile.TemporaryDirectory(prefix="safetydpo-s3-", dir="/var/tmp") as folder:
        server = S3Server(Path(folder), address=S3_ADDRESS, inside=("ip", "netns", "exec", S3_NAMESPACE))
        shells = {**server.variables, **QUICK, "OMP_NUM_THREADS": "1", **(variables or {})}
        with three_hosts(shells) as hosts:
            hosts.add_network(S3_NAMESPACE, S3_ADDRESS)
            one = Rehearsal(hosts, server)
            one.token.write_text("0123456789abcdef" * 4)
            one.token.chmod(0o600)
            try:
                server.start()
                yield one
            finally:
                one.close()
                server.stop()


def store_of(name: str) -> tuple[str, str]:
    """Return the settings that put a run into the bucket under a name."""
    return f"store=s3://{BUCKET}/{name}/store", f"run_dir=s3://{BUCKET}/{name}/run"
