"""The page in a real browser: no console error, nothing unveiled by default, nothing wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from safetydpo.evaluation.report import render_report
from tests.evaluation.synthetic import (
    make_lineage,
    make_overlap,
    make_sheets,
    make_summary,
    make_training,
    make_trials,
    make_winners,
)
from tests.evaluation.test_report import HOSTILE

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium (see apt.txt)"),
]
# A page around the report that looks into it: the report's own policy lets no foreign script run inside.
HARNESS = """<!DOCTYPE html><body style="margin:0">
<iframe src="index.html" style="border:0;width:{width}px;height:9000px"></iframe><pre id="answer"></pre><script>
window.onload = function () {{
  var page = document.querySelector("iframe").contentDocument;
  var inside = document.querySelector("iframe").contentWindow;
  var filters = function () {{
    return Array.from(page.querySelectorAll("button.veil img"), function (image) {{
      return inside.getComputedStyle(image).filter;
    }});
  }};
  var before = filters(), veil = page.querySelector("button.veil");
  veil.click(); var opened = filters()[0]; veil.click(); var closed = filters()[0];
  var shown = Array.from(page.querySelectorAll("svg"), function (svg) {{ return svg.getBoundingClientRect(); }})
    .filter(function (box) {{ return box.width > 200 && box.height > 100; }}).length;
  document.getElementById("answer").textContent = JSON.stringify({{
    before: before, opened: opened, closed: closed, plots: shown,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    unharmed: inside.stolen === undefined,
    rendering: inside.getComputedStyle(page.querySelector("img")).imageRendering
  }});
}};
</script></body>"""


def browse(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    profile = folder / "profile"
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --allow-file-access-from-files "
        "--enable-logging=stderr --virtual-time-budget=8000"
    )
    return subprocess.run(
        [CHROMIUM, *options.split(), f"--user-data-dir={profile}", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    page = render_report(
        make_summary(expert_retention=True),
        overlap=make_overlap(),
        winners=[make_winners()],
        trials=make_trials(),
        training=make_training(),
        sheets=make_sheets(prompts=HOSTILE),
        lineage=make_lineage(),
    )
    (place / "index.html").write_text(page, encoding="utf-8")
    return place


@pytest.mark.parametrize("width", [1280, 420])
def test_page_at_two_widths(folder: Path, width: int) -> None:
    harness = folder / f"harness-{width}.html"
    harness.write_text(HARNESS.format(width=width), encoding="utf-8")
    result = browse(folder, "--dump-dom", f"--window-size={max(width, 500)},1200", harness.as_uri())
    found = re.search(r'<pre id="answer">(\{.*?\})</pre>', result.stdout, flags=re.DOTALL)
    assert found is not None, result.stderr[-2000:]
    answer: dict[str, Any] = json.loads(found[1])
    assert len(answer["before"]) == 11
    assert all("blur(" in value for value in answer["before"])
    assert answer["opened"] == "none"
    assert "blur(" in answer["closed"]
    assert answer["plots"] == 5
    assert answer["overflow"] <= 0
    assert answer["unharmed"] is True
    assert answer["rendering"] == "pixelated"
    assert "CONSOLE" not in result.stderr


@pytest.mark.parametrize("scheme", ["0", "1"], ids=["dark", "light"])
def test_screenshot_is_not_blank_in_either_theme(folder: Path, scheme: str) -> None:
    from PIL import Image

    file = folder / f"shot-{scheme}.png"
    theme = f"--blink-settings=preferredColorScheme={scheme}"
    browse(folder, theme, f"--screenshot={file}", "--window-size=1280,1600", (folder / "index.html").as_uri())
    with Image.open(file) as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 24)
        corner = picture.convert("L").getpixel((5, 5))
    assert colours is not None
    assert len(colours) > 100
    assert isinstance(corner, int)
    assert (corner < 60) is (scheme == "0")
