"""Three hosts on one machine: each its own network, processes, mounts, /tmp, /dev/shm and home, reached over SSH.

Needs root, and Debian's iproute2, openssh-server and rsync. Disk (but /tmp and the home), processors, memory and clock
are shared.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.ray.smoke_place import PATIENCE, ROOT, wait_for

BRIDGE, NETWORK = "sdpo0", "10.77.0"
S3_ADDRESS, S3_NAMESPACE = f"{NETWORK}.9", "sdpo-s3"
NUMBERS = (1, 2, 3)
SSH_OPTIONS = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR")
TOOLS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")


def what_is_missing() -> str | None:
    """Return why hosts cannot be made here, None if they can."""
    if os.geteuid():
        return "needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} (apt.txt)"
    # A container may be root and yet not be let.
    inside = ["unshare", "-m", "-n", "-p", "-f", "--mount-proc", "ip", "link", "add", "probe", "type", "bridge"]
    tried = subprocess.run(inside, capture_output=True, text=True, check=False)
    return f"needs namespaces of its own: {tried.stderr.strip()}" if tried.returncode else None


def ip(*arguments: str) -> None:
    """Run `ip ARGUMENTS`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Host:
    """One host; its first process is its SSH server, and with that everything of it ends."""

    number: int
    folder: Path
    outer: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Its address in the network of the hosts."""
        return f"{NETWORK}.{self.number}"

    @property
    def namespace(self) -> str:
        """Its network namespace."""
        return f"sdpo-h{self.number}"

    @property
    def home(self) -> Path:
        """What the host sees as the home of root."""
        return self.folder / "home"

    def processes(self) -> list[psutil.Process]:
        """Every process of the host that is alive."""
        if self.outer is None or self.outer.poll() is not None:
            return []
        return psutil.Process(self.outer.pid).children(recursive=True)

    def find(self, *words: str) -> list[psutil.Process]:
        """Its processes whose command line holds one of the words."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if any(word in line for word in words):
                    found.append(process)
        return found

    def cut(self) -> None:
        """Drop every packet from and to the host; connections stay open and hear nothing."""
        ip("link", "set", f"sdpo-v{self.number}", "down")

    def join(self) -> None:
        """Carry packets again."""
        ip("link", "set", f"sdpo-v{self.number}", "up")


@dataclass
class Hosts:
    """The hosts, the bridge between them, and the keys to them."""

    folder: Path
    hosts: list[Host] = field(default_factory=list)

    @property
    def key(self) -> Path:
        """The private key that opens every host."""
        return self.folder / "id"

    def start(self, variables: Mapping[str, str]) -> None:
        """Make bridge and hosts and wait until each answers; `variables` stand in the environment of their shells."""
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for name in ("id", "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(command, check=True)
        shutil.copy(self.folder / "id.pub", self.folder / "authorized_keys")
        Path("/run/sshd").mkdir(exist_ok=True)
        for number in NUMBERS:
            host = Host(number, self.folder / f"h{number}")
            self.hosts.append(host)
            self._connect(host.namespace, f"sdpo-v{number}", host.address)
            self._start(host, variables)
        for host in self.hosts:
            assert wait_for(lambda host=host: self.ssh(host, "true").returncode == 0, seconds=20), host.folder

    def _connect(self, namespace: str, link: str, address: str) -> None:
        ip("netns", "add", namespace)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        ip("link", "set", link, "master", BRIDGE)
        ip("link", "set", link, "up")
        for command in (("link", "set", "lo", "up"), ("addr", "add", f"{address}/24", "dev", "eth0")):
            ip("-n", namespace, *command)
        ip("-n", namespace, "link", "set", "eth0", "up")

    def add_network(self, namespace: str, address: str) -> None:
        """Make a network without a host, for a server that all hosts reach."""
        self._connect(namespace, f"v{namespace}"[:15], address)

    def _start(self, host: Host, variables: Mapping[str, str]) -> None:
        host.home.mkdir(parents=True)
        (host.folder / "tmp").mkdir()
        exports = " ".join(f"{name}={value}" for name, value in variables.items())
        (host.home / ".bashrc").write_text(f"export {exports}\n")
        venv = host.home / "safetydpo-venv"
        venv.symlink_to(sys.prefix)
        (host.folder / "sshd_config").write_text(
            f"ListenAddress {host.address}\nHostKey {self.folder}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nPermitRootLogin prohibit-password\n"
            "PasswordAuthentication no\nUsePAM no\nStrictModes no\nMaxStartups 100\nMaxSessions 100\n"
        )
        script = [f"hostname h{host.number}", "mount --make-rprivate /"]
        script += [f"mkdir -p {new}; mount --bind {old} {new}" for old, new in self._kept_visible(host)]
        script += [
            f"mount --rbind {host.home} {Path.home()}",
            "mount -t tmpfs -o size=2g tmpfs /dev/shm",
            f"mount --rbind {host.folder}/tmp /tmp; chmod 1777 /tmp",
            f"exec /usr/sbin/sshd -D -e -f {host.folder}/sshd_config",
        ]
        inside = ["ip", "netns", "exec", host.namespace, "unshare", "-m", "-u", "-i", "-p", "-f", "--mount-proc"]
        with (host.folder / "sshd.log").open("wb") as log:
            host.outer = subprocess.Popen(
                [*inside, "--kill-child=KILL", "bash", "-ec", "\n".join(script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _kept_visible(self, host: Host) -> Iterator[tuple[Path, Path]]:
        """Yield (what the private home or /tmp would hide, where it is bound before)."""
        built = Path.home() / ".cache" / "torch_extensions"
        wanted = {Path(sys.base_prefix), ROOT, Path(sys.prefix), *([built] if built.is_dir() else [])}
        for path in sorted(wanted):
            for place, private in ((Path.home(), host.home), (Path("/tmp"), host.folder / "tmp")):
                if path.is_relative_to(place):
                    yield path, private / path.relative_to(place)

    def ssh(self, host: Host, command: str, *, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command on a host."""
        return subprocess.run(
            ["ssh", "-i", str(self.key), *SSH_OPTIONS, "-o", "ConnectTimeout=5", f"root@{host.address}", command],
            capture_output=True,
            text=True,
            timeout=seconds * PATIENCE,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def stop(self) -> None:
        """Power every host off and take networks and files away."""
        for host in self.hosts:
            if host.outer is not None:
                host.outer.kill()
                host.outer.wait()
        for namespace in (*(host.namespace for host in self.hosts), S3_NAMESPACE):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)
        # The kernel takes mounts of ended hosts apart in its own time.
        deadline = time.time() + 30 * PATIENCE
        while self.folder.exists() and time.time() < deadline:
            shutil.rmtree(self.folder, ignore_errors=True)
            time.sleep(0.1)


@contextlib.contextmanager
def three_hosts(variables: Mapping[str, str]) -> Iterator[Hosts]:
    """Three hosts whose shells have these variables; nothing of them is left at the end."""
    # Not below /tmp, which each host replaces by its own.
    hosts = Hosts(Path(tempfile.mkdtemp(prefix="safetydpo-hosts-", dir="/var/tmp")))
    try:
        hosts.folder.chmod(0o700)
        hosts.start(variables)
        yield hosts
    finally:
        hosts.stop()
