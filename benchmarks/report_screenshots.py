"""Pictures of a report's page in Chromium, light, dark and as narrow as a phone: those of the README.

    python -m benchmarks.report_screenshots runs/demo/report/index.html [--out docs/images]

Needs Debian's chromium (apt.txt). What is on them is the first screen of the page, with everything unsafe veiled.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

Theme = Literal["dark", "light"]
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --allow-file-access-from-files "
    "--enable-logging=stderr --virtual-time-budget=8000"
)
SCHEMES: dict[Theme, str] = {"dark": "0", "light": "1"}
"""Chromium's numbers of what a page is told that its reader prefers."""


@dataclass(frozen=True)
class Shot:
    """One picture: its name, and the size of the window in pixels."""

    name: str
    theme: Theme
    width: int
    height: int


SHOTS = (
    Shot("report-light", "light", 1200, 1780),
    Shot("report-dark", "dark", 1200, 1240),
    Shot("report-narrow", "light", 500, 1900),
)
"""Chromium has no window narrower than 500 pixels."""


def main() -> None:
    """Take the pictures of the README and print where each one is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    if not options.page.is_file():
        parser.error(f"expected a page at {options.page}, found none: run `safetydpo demo` first")
    options.out.mkdir(parents=True, exist_ok=True)
    for shot in SHOTS:
        file = options.out / f"{shot.name}.png"
        take_screenshot(options.page, file, theme=shot.theme, width=shot.width, height=shot.height)
        with Image.open(file) as picture:
            # A page has few colours: a palette of them takes a third of the space.
            palette = picture.convert("RGB").quantize(256)
        palette.save(file, optimize=True)
        print(file)


def take_screenshot(page: Path, file: Path, *, theme: Theme, width: int, height: int) -> None:
    """Write what a window of this size shows of a page to a PNG file."""
    scheme = f"--blink-settings=preferredColorScheme={SCHEMES[theme]}"
    browse(scheme, f"--screenshot={file.resolve()}", f"--window-size={width},{height}", page.resolve().as_uri())


def browse(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Chromium without a window, in a profile of its own; its standard error has what pages say on the console.

    Raises:
        SystemExit: if it is not installed.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("expected chromium on the PATH, found none: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        return subprocess.run(
            [chromium, *OPTIONS.split(), f"--user-data-dir={profile}", *arguments],
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )


if __name__ == "__main__":
    main()
