"""A real S3 server for tests: SeaweedFS on loopback, its data on the disk, so that it survives a SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs

from tests.ports import free_ports

ACCESS_KEY = "test-access-key-7f3a"
SECRET_KEY = "test-secret-key-c91e"
BUCKET = "pictures"
PATIENCE = float(os.environ.get("SAFETYDPO_TEST_PATIENCE", "1"))
# The server's parts, each with an HTTP and a gRPC port; given, because several servers may run at once.
PARTS = ("master", "volume", "filer", "s3", "admin")


@dataclass
class S3Server:
    """One server with one bucket; it may be killed and started again on the same ports with the same data."""

    folder: Path
    ports: list[int] = field(default_factory=lambda: free_ports(2 * len(PARTS)))
    process: subprocess.Popen[bytes] | None = None
    address: str = "127.0.0.1"
    inside: tuple[str, ...] = ()
    """What runs its command in another network, such as `ip netns exec NAME`."""

    @property
    def endpoint(self) -> str:
        """The URL of its S3 protocol; its other ports know no credentials."""
        return f"http://{self.address}:{self.ports[2 * PARTS.index('s3')]}"

    @property
    def variables(self) -> dict[str, str]:
        """The standard environment variables that lead there."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> S3Server:
        """Start the process and wait until it takes objects."""
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        identity = {"name": "tests", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]}
        # No more than docs/storage.md asks of a bucket's policy.
        identity["actions"] = ["Read", "Write", "List"]
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        deadline = time.time() + 30 * PATIENCE
        while not self._is_ready():
            if self.process.poll() is not None or time.time() > deadline:
                self.stop()
                raise RuntimeError(f"no S3 server: {(self.folder / 'log.txt').read_text()[-2000:]}")
            time.sleep(0.02)
        return self

    def _command(self) -> list[str]:
        flags = {"dir": self.folder / "data", "ip": self.address, "ip.bind": self.address, "bucket": BUCKET}
        flags |= {"master.telemetry": "false", "webdav": "false", "admin.ui": "false", "s3.iam": "false"}
        flags |= {"s3.port.iceberg": 0, "s3.port.lance": 0, "s3.autoCreateBucket": "false"}
        flags |= {"s3.config": self.folder / "s3.json"}
        for index, part in enumerate(PARTS):
            flags |= {f"{part}.port": self.ports[2 * index], f"{part}.port.grpc": self.ports[2 * index + 1]}
        weed = Path(sys.executable).parent / "weed"
        return [*self.inside, str(weed), "-logtostderr", "mini", *(f"-{name}={value}" for name, value in flags.items())]

    def _is_ready(self) -> bool:
        """Whether it takes objects: its parts find each other, and make the bucket, after the port has opened."""
        filesystem = pafs.S3FileSystem(
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            endpoint_override=self.endpoint.removeprefix("http://"),
            scheme="http",
            region="us-east-1",
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=0),
        )
        try:
            # Dotted, so that no listing of ours shows it.
            with filesystem.open_output_stream(f"{BUCKET}/.ready") as stream:
                stream.write(b"ready")
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """End it as a lost machine would, in the middle of what it does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Keep its connections and answer none."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Answer again."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kill it and take away the sockets that it leaves behind in /tmp."""
        if self.process is not None:
            self.kill()
        for port in self.ports:
            for leftover in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                leftover.unlink(missing_ok=True)
