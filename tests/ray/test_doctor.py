"""`safetydpo doctor`: names what is missing and what needs it, for every line of apt.txt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs.doctor import PROGRAM_FOLDER_OF_ROOT, SYSTEM_PACKAGES, Check, machine_checks
from tests.architecture.source import ROOT


def packages_of_the_project() -> dict[str, str]:
    """{package: what it is for} of apt.txt."""
    lines = (ROOT / "apt.txt").read_text(encoding="utf-8").splitlines()
    return {name.strip(): use.strip() for name, _, use in (line.partition("#") for line in lines) if name.strip()}


def checks_of(root: Path, *, path: str = "", memory_gib: float = 16.0) -> dict[str, Check]:
    return {check.name: check for check in machine_checks(path=path, root=root, memory_gib=memory_gib)}


def test_it_knows_the_packages_of_the_project_and_no_others() -> None:
    assert [package.apt for package in SYSTEM_PACKAGES] == list(packages_of_the_project())


def test_on_an_empty_machine_every_package_is_missing_and_what_needs_it_is_said(tmp_path: Path) -> None:
    found = checks_of(tmp_path)
    for name in packages_of_the_project():
        assert (found[name].found, found[name].is_enough, found[name].is_required) == ("", False, False)
        assert found[name].needed_for.endswith(f" (apt: {name})")
        assert len(found[name].needed_for) > len(f" (apt: {name})")
    assert not found["git"].is_enough


def test_each_package_is_found_where_it_is_installed(tmp_path: Path) -> None:
    """Programs in a folder of PATH, one in the superuser's, a font in its place."""
    programs, of_root = tmp_path / "bin", tmp_path / PROGRAM_FOLDER_OF_ROOT
    for package in SYSTEM_PACKAGES:
        folder = tmp_path if "/" in package.looks_for else of_root if package.apt == "openssh-server" else programs
        file = folder / package.looks_for
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
    found = checks_of(tmp_path, path=f"/nowhere:{programs}")
    assert [found[name].is_enough for name in packages_of_the_project()] == [True] * len(SYSTEM_PACKAGES)
    assert found["make"].found == str(programs / "make")
    assert found["openssh-server"].found == str(of_root / "sshd")


@pytest.mark.parametrize(("memory", "is_enough"), [(7.7, True), (7.45, True), (6.8, False)])
def test_a_machine_sold_with_8_gb_has_enough_memory(tmp_path: Path, memory: float, is_enough: bool) -> None:
    """8 GB are 7.45 GiB if they are decimal; of 8 GiB the kernel shows about 7.7."""
    found = checks_of(tmp_path, memory_gib=memory)["memory >= 7 GiB"]
    assert (found.is_enough, found.is_required) == (is_enough, True)
    assert found.found == f"{memory:.1f} GiB"


def test_the_command_with_an_empty_path_prints_each_with_what_needs_it(tmp_path: Path) -> None:
    """What only PATH leads to is missing, and none of it stops the demo."""
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.cli", "doctor"],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    rows = rows_of(done.stdout)
    assert done.returncode == (1 if rows["memory >= 7 GiB"][0].startswith("missing") else 0), done.stderr
    assert {package.apt: f"{package.needed_for} (apt: {package.apt})" for package in SYSTEM_PACKAGES}.items() <= {
        name: needed_for for name, (_, needed_for) in rows.items()
    }.items()
    for name in ("git", "make", "g++", "chromium", "rsync"):
        assert rows[name][0] == "missing"
    for name in ("Python >= 3.11", "demo weights", "torch", "ray"):
        assert rows[name][0].startswith("ok ")


def rows_of(table: str) -> dict[str, tuple[str, str]]:
    """{check: what was found, what needs it} of a printed table; a folded cell is put together again."""
    rows: dict[str, tuple[str, str]] = {}
    name = ""
    for line in table.splitlines():
        if line.startswith("│"):
            first, found, needed_for = (cell.strip() for cell in line.strip("│").split("│"))
            name = first or name
            before = rows.get(name, ("", ""))
            rows[name] = (f"{before[0]} {found}".strip(), f"{before[1]} {needed_for}".strip())
    return rows
