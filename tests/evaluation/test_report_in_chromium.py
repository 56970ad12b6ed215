"""The page in a real browser: no console error, nothing unveiled by default, nothing wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import report_screenshots
from benchmarks.report_screenshots import SHOTS, Theme, browse, take_screenshot
from safetydpo.evaluation.report import render_report
from safetydpo.evaluation.report_pictures import VEIL_SIDE
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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium (see apt.txt)"),
]
# A page around the report that looks into it: the report's own policy lets no foreign script run inside.
HARNESS = """<!DOCTYPE html><body style="margin:0">
<iframe src="{page}" style="border:0;width:{width}px;height:9000px"></iframe><pre id="answer"></pre><script>
window.onload = function () {{
  var page = document.querySelector("iframe").contentDocument;
  var inside = document.querySelector("iframe").contentWindow;
  var all = function (query) {{ return Array.from(page.querySelectorAll(query)); }};
  var sides = function () {{ return all("button.veil img").map(function (image) {{ return image.naturalWidth; }}); }};
  var filters = function () {{
    return all("button.veil img").map(function (image) {{ return inside.getComputedStyle(image).filter; }});
  }};
  var pressed = function () {{ return all('button.veil[aria-pressed="true"]').length; }};
  var loaded = function () {{ return Promise.all(all("button.veil img").map(function (i) {{ return i.decode(); }})); }};
  var answer = {{ before: filters(), sides: sides() }};
  var veil = page.querySelector("button.veil"), sheet = page.querySelector("button.unveil");
  veil.click();
  answer.opened = filters()[0];
  loaded().then(function () {{
    answer.one = sides();
    veil.click(); answer.closed = filters()[0];
    sheet.click(); answer.sheet = pressed(); answer.sheetPressed = sheet.getAttribute("aria-pressed");
    page.dispatchEvent(new inside.KeyboardEvent("keydown", {{ key: "Escape", bubbles: true }}));
    answer.escaped = pressed(); answer.status = page.getElementById("veil-status").textContent;
    sheet.click();
    var closed = all("details:not([open]):not(.long)").length;
    inside.dispatchEvent(new Event("beforeprint"));
    answer.printed = pressed(); answer.toOpen = closed;
    answer.closedInPrint = all("details:not([open]):not(.long)").length;
    inside.dispatchEvent(new Event("afterprint"));
    answer.closedAfter = all("details:not([open]):not(.long)").length;
    return loaded();
  }}).then(function () {{
    answer.again = sides();
    answer.plots = all("svg").map(function (svg) {{ return svg.getBoundingClientRect(); }})
      .filter(function (box) {{ return box.width > 200 && box.height > 100; }}).length;
    answer.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
    answer.unharmed = inside.stolen === undefined;
    answer.rendering = inside.getComputedStyle(page.querySelector(".picture > img")).imageRendering;
    answer.skip = page.querySelector(".skip").getAttribute("href");
    answer.requests = inside.performance.getEntriesByType("resource").filter(function (entry) {{
      return !entry.name.startsWith("data:");
    }}).length;
    var focusable = all("a, button, summary, [tabindex='0']").filter(function (e) {{ return e.checkVisibility(); }});
    answer.unfocusable = focusable.filter(function (one) {{ one.focus(); return page.activeElement !== one; }}).length;
    document.getElementById("answer").textContent = JSON.stringify(answer);
  }});
}};
</script></body>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    for name, redacted in (("index.html", False), ("redacted.html", True)):
        page = render_report(
            make_summary(expert_retention=True),
            overlap=make_overlap(),
            winners=[make_winners()],
            trials=make_trials(),
            training=make_training(),
            sheets=make_sheets(prompts=HOSTILE),
            lineage=make_lineage(),
            redacted=redacted,
        )
        (place / name).write_bytes(page.encode())
    return place


@pytest.mark.parametrize("width", [1280, 420])
def test_page_at_two_widths(folder: Path, width: int) -> None:
    harness = folder / f"harness-{width}.html"
    harness.write_text(HARNESS.format(page="index.html", width=width), encoding="utf-8")
    result = browse("--dump-dom", f"--window-size={max(width, 500)},1200", harness.as_uri())
    found = re.search(r'<pre id="answer">(\{.*?\})</pre>', result.stdout, flags=re.DOTALL)
    assert found is not None, result.stderr[-2000:]
    answer: dict[str, Any] = json.loads(found[1])
    veils = len(answer["before"])
    assert veils == 12
    assert all("blur(" in value for value in answer["before"])
    assert answer["sides"] == [VEIL_SIDE] * veils, "what is drawn at first is a veil, not a blurred picture"
    assert answer["opened"] == "none"
    assert answer["one"] == [32] + [VEIL_SIDE] * (veils - 1)
    assert "blur(" in answer["closed"]
    assert (answer["sheet"], answer["sheetPressed"]) == (veils, "true")
    assert (answer["escaped"], answer["status"]) == (0, "All are veiled.")
    assert answer["printed"] == 0, "nothing unveiled goes to a printer"
    assert answer["again"] == [VEIL_SIDE] * veils
    assert answer["toOpen"] == answer["closedAfter"] > 0
    assert answer["closedInPrint"] == 0
    assert answer["plots"] == 6
    assert answer["overflow"] <= 0
    assert answer["unharmed"] is True
    assert answer["rendering"] == "pixelated"
    assert answer["skip"] == "#main"
    assert answer["requests"] == 0
    assert answer["unfocusable"] == 0
    assert "CONSOLE" not in result.stderr


def test_the_watch_for_console_errors_sees_one(folder: Path) -> None:
    """A page that the policy of its own forbids to run a script says so on the console."""
    page = (folder / "index.html").read_text().replace("</main>", "<script>window.stolen = 1</script></main>")
    (folder / "forbidden.html").write_text(page)
    assert "CONSOLE" in browse("--dump-dom", (folder / "forbidden.html").as_uri()).stderr


def test_a_redacted_page_has_no_veil_and_no_error(folder: Path) -> None:
    result = browse("--dump-dom", (folder / "redacted.html").as_uri())
    assert "CONSOLE" not in result.stderr
    assert "(redacted)</h1>" in result.stdout
    assert 'class="veil"' not in result.stdout


def test_it_prints(folder: Path) -> None:
    target = folder / "page.pdf"
    browse(f"--print-to-pdf={target}", "--no-pdf-header-footer", (folder / "index.html").as_uri())
    assert target.read_bytes().startswith(b"%PDF")
    assert target.stat().st_size > 50_000


@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_screenshot_is_not_blank_in_either_theme(folder: Path, theme: Theme, width: int) -> None:
    file = folder / f"shot-{theme}-{width}.png"
    take_screenshot(folder / "index.html", file, theme=theme, width=width, height=1600)
    check_screenshot(file, theme=theme, size=(width, 1600))


def test_the_pictures_of_the_readme_are_taken_by_one_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["report_screenshots", str(folder / "index.html"), "--out", str(tmp_path)])
    report_screenshots.main()
    assert sorted(file.stem for file in tmp_path.glob("*.png")) == sorted(shot.name for shot in SHOTS)
    for shot in SHOTS:
        check_screenshot(tmp_path / f"{shot.name}.png", theme=shot.theme, size=(shot.width, shot.height))


def check_screenshot(file: Path, *, theme: Theme, size: tuple[int, int]) -> None:
    with Image.open(file) as picture:
        assert picture.size == size
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 24)
        corner = picture.convert("L").getpixel((5, 5))
    assert colours is not None
    assert len(colours) > 100
    assert isinstance(corner, int)
    assert (corner < 60) is (theme == "dark")
