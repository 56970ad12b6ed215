"""What this machine lacks, and what needs it; whether a cluster can do what is asked."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table

from ray_jobs.run import RECORDED_PACKAGES
from ray_jobs.terminal import output_console
from safetydpo.artifacts.layout import demo_weights
from safetydpo.config.load import load_config
from safetydpo.config.schema import Config

MIN_MEMORY_GIB = 7.0
"""A machine sold with 8 GB shows less: 7.45 GiB at most if they are decimal, and what the kernel keeps is not seen."""
PROGRAM_FOLDER_OF_ROOT = "usr/sbin"
"""Where programs lie that a user's PATH may leave out, such as sshd."""


@dataclass(frozen=True)
class Check:
    """One thing that is looked for.

    Attributes:
        name: What it is.
        found: Version, place or amount; "" = nothing.
        is_enough: Whether that will do.
        needed_for: What does not work without it.
        is_required: Whether the demo needs it.
    """

    name: str
    found: str
    is_enough: bool
    needed_for: str
    is_required: bool = False


@dataclass(frozen=True)
class SystemPackage:
    """A package of the system; each has a line in apt.txt.

    Attributes:
        apt: Its name there.
        looks_for: A program, or a file below the root folder.
        needed_for: What does not work without it.
    """

    apt: str
    looks_for: str
    needed_for: str

    def find(self, *, path: str, root: Path) -> str | None:
        """Return where it is, looking for programs in the folders of `path` and those of `root`."""
        if "/" in self.looks_for:
            file = root / self.looks_for
            return str(file) if file.is_file() else None
        # An empty part of a PATH would mean the working directory.
        folders = [folder for folder in path.split(os.pathsep) if folder]
        return shutil.which(self.looks_for, path=os.pathsep.join([*folders, str(root / PROGRAM_FOLDER_OF_ROOT)]))


SYSTEM_PACKAGES = (
    SystemPackage("make", "make", "the commands of this project"),
    SystemPackage("g++", "g++", "operators that DeepSpeed compiles at first use"),
    SystemPackage(
        "fonts-noto-color-emoji",
        "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
        "rebuilding the demo world",
    ),
    SystemPackage("chromium", "chromium", "screenshots in the slow tests"),
    SystemPackage("iproute2", "ip", "make test-cluster: networks of its hosts"),
    SystemPackage("openssh-server", "sshd", "make test-cluster: `ray up` reaches its hosts"),
    SystemPackage("rsync", "rsync", "make test-cluster: `ray up` copies files to its hosts"),
)


def check_machine() -> int:
    """Print one line per check; return 0 if nothing that the demo needs is missing, else 1."""
    table = Table("check", "found", "needed for")
    checks = machine_checks(path=os.environ.get("PATH", ""), root=Path("/"), memory_gib=memory_of_this_machine())
    for check in checks:
        mark = "[green]ok[/green]"
        if not check.is_enough:
            mark = "[red]missing[/red]" if check.is_required else "[yellow]missing[/yellow]"
        table.add_row(check.name, f"{mark} {check.found}", check.needed_for)
    output_console().print(table)
    return 1 if any(check.is_required and not check.is_enough for check in checks) else 0


def check_address(address: str, config: Path | None, settings: list[str], *, working_dir: Path) -> int:
    """Check the cluster at `address` for what the config asks; print one line per check, return 0 if all is well.

    A dashboard's address gets the check as a job; any other is joined from here, which only a node of it can do.
    """
    if address.startswith(("http://", "https://")):
        from ray_jobs.jobs_command import check_remote_cluster

        return check_remote_cluster(address, config, settings, working_dir=working_dir)
    from ray_jobs.precheck_command import run_checks

    loaded = Config() if config is None else load_config(config, settings)
    execution = loaded.execution.model_copy(update={"ray_address": address})
    run_checks(loaded.model_copy(update={"execution": execution}), with_store=config is not None)
    return 0


def memory_of_this_machine() -> float:
    """Return its memory in GiB, as far as the kernel shows it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def machine_checks(*, path: str, root: Path, memory_gib: float) -> list[Check]:
    """Return what is found of all that the project needs of a machine.

    Args:
        path: Folders of programs, with `:` between them.
        root: The folder that the system's files lie in.
        memory_gib: Memory in GiB.
    """
    python, cores = sys.version.split()[0], os.cpu_count() or 0
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    weights = demo_weights() / "base" / "model_index.json"
    git, versions = shutil.which("git", path=path) or "", _versions()
    return [
        Check("Python >= 3.11", python, sys.version_info >= (3, 11), "everything", is_required=True),
        Check(
            f"memory >= {MIN_MEMORY_GIB:g} GiB",
            f"{memory_gib:.1f} GiB",
            memory_gib >= MIN_MEMORY_GIB,
            "the demo",
            is_required=True,
        ),
        Check("2 cores", str(cores), cores >= 2, "the demo in 15 minutes"),
        Check("git", git, bool(git), "the commit named in results"),
        _file("Python headers", header, "operators that DeepSpeed compiles at first use (apt: python3-dev)"),
        *(_system_package(package, path=path, root=root) for package in SYSTEM_PACKAGES),
        _file("demo weights", weights, "the demo", is_required=True),
        *(_python_package(name, versions=versions) for name in RECORDED_PACKAGES),
    ]


def _system_package(package: SystemPackage, *, path: str, root: Path) -> Check:
    found = package.find(path=path, root=root)
    return Check(package.apt, found or "", found is not None, f"{package.needed_for} (apt: {package.apt})")


def _file(name: str, file: Path, needed_for: str, *, is_required: bool = False) -> Check:
    is_there = file.is_file()
    return Check(name, str(file.parent) if is_there else "", is_there, needed_for, is_required)


def _python_package(name: str, *, versions: Mapping[str, str]) -> Check:
    return Check(name, versions.get(name, ""), name in versions, "everything (make setup)", is_required=True)


def _versions() -> dict[str, str]:
    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
