"""What this machine lacks, and what needs it; whether a cluster can do what is asked."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table

from ray_jobs.run import RECORDED_PACKAGES
from ray_jobs.terminal import TextConsole
from safetydpo.artifacts.layout import demo_weights
from safetydpo.config.load import load_config
from safetydpo.config.schema import Config

MIN_MEMORY_GIB = 8

_SSH = "make test-cluster (apt: openssh-server)"


def check_machine() -> int:
    """Print one line per check; return 0 if nothing that the demo needs is missing, else 1."""
    table = Table("check", "found", "needed for")
    failed = False
    for name, found, needed_for, required in _checks():
        ok = found is not None
        failed |= required and not ok
        mark = "[green]ok[/green]" if ok else ("[red]missing[/red]" if required else "[yellow]missing[/yellow]")
        table.add_row(name, f"{mark} {found or ''}", needed_for)
    TextConsole().print(table)
    return 1 if failed else 0


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


def _checks() -> list[tuple[str, str | None, str, bool]]:
    python = sys.version.split()[0]
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    font = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    weights = demo_weights() / "base" / "model_index.json"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    checks: list[tuple[str, str | None, str, bool]] = [
        ("Python >= 3.11", python if sys.version_info >= (3, 11) else None, "everything", True),
        (
            f"memory >= {MIN_MEMORY_GIB} GiB",
            f"{memory:.0f} GiB" if memory >= MIN_MEMORY_GIB else None,
            "the demo",
            True,
        ),
        ("2 cores", str(os.cpu_count()) if (os.cpu_count() or 0) >= 2 else None, "the demo in 15 minutes", False),
        ("git", shutil.which("git"), "the commit named in results", False),
        ("make", shutil.which("make"), "the commands of this project (apt: make)", False),
        ("g++", shutil.which("g++"), "operators that DeepSpeed compiles (apt: g++)", False),
        ("Python headers", str(header) if header.is_file() else None, "the same (apt: python3-dev)", False),
        (
            "emoji font",
            str(font) if font.is_file() else None,
            "rebuilding the demo world (apt: fonts-noto-color-emoji)",
            False,
        ),
        ("chromium", shutil.which("chromium"), "screenshots in the slow tests (apt: chromium)", False),
        ("ip", shutil.which("ip"), "make test-cluster (apt: iproute2)", False),
        ("sshd", shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin"), _SSH, False),
        ("rsync", shutil.which("rsync"), "make test-cluster (apt: rsync)", False),
        ("demo weights", str(weights.parent) if weights.is_file() else None, "the demo", True),
    ]
    for package in RECORDED_PACKAGES:
        try:
            found: str | None = version(package)
        except PackageNotFoundError:
            found = None
        checks.append((package, found, "everything (make setup)", True))
    return checks
