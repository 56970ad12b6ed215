"""The project's own source files, for tests about how they are written."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("safetydpo", "ray_jobs")
CODE = (*PACKAGES, "benchmarks", "tests")


def python_files(*folders: str) -> list[Path]:
    """Return the Python files below `folders`, in path order."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def shown(path: Path) -> str:
    """Return the path as a test's name."""
    return str(path.relative_to(ROOT))


def files_of_the_project() -> list[Path]:
    """Return every file that git holds or would take."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]
