from __future__ import annotations

import re
from pathlib import Path


def test_nobody_makes_a_plain_console_of_rich(root: Path):
    """It would obey the escape sequences and tags of a prompt; `ray_jobs/terminal.py` has one that does not."""
    files = [file for package in ("ray_jobs", "safetydpo") for file in (root / package).rglob("*.py")]
    pattern = re.compile(r"\bConsole\(|rich\.print|from rich import .*\bprint\b")
    assert not [file.name for file in files if pattern.search(file.read_text(encoding="utf-8"))]
