"""`pyproject.toml` holds ranges, `constraints.txt` the exact tested set; the two must agree."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from safetydpo import __version__
from tests.architecture.source import ROOT, files_of_the_project

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [text for extra in PROJECT.get("optional-dependencies", {}).values() for text in extra]
DIRECT = [Requirement(text) for text in (*PROJECT["dependencies"], *EXTRAS)]
PINS = {
    canonicalize_name(name): Version(version)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if (text := line.partition("#")[0].strip())
    for name, version in [text.split("==")]
}
TEXT_ENDINGS = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".html", ".j2", ".sh", ".cfg", ""}
# Put together here, so that this file does not name them itself.
OF_ONE_MACHINE = ("/work" + "/", "." + "library", "sub" + "agent")


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_each_direct_dependency_is_pinned_inside_its_range(requirement: Requirement):
    pin = PINS.get(canonicalize_name(requirement.name))
    assert pin is not None, f"expected {requirement.name} in constraints.txt"
    assert requirement.specifier.contains(pin), f"{requirement} does not allow the pinned {pin}"


def test_torchvision_is_not_needed():
    """Its wheels do not import beside every torch build that the constraints allow."""
    assert "torchvision" not in PINS


def test_the_change_log_knows_this_version():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_text_names_a_place_of_one_machine():
    found = []
    for path in files_of_the_project():
        if path.suffix in TEXT_ENDINGS and path.stat().st_size < 1_000_000:
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{path.relative_to(ROOT)}: {word}" for word in OF_ONE_MACHINE if word in text]
    assert found == []


def test_no_file_is_large_but_the_demo_weights():
    allowed = Path("safetydpo/demo/weights")
    large = [path for path in files_of_the_project() if path.stat().st_size > 1_000_000]
    assert [path for path in large if not path.relative_to(ROOT).is_relative_to(allowed)] == []


def test_make_bench_runs_benchmarks_that_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (listed,) = (line.partition(":=")[2].split() for line in makefile.splitlines() if line.startswith("BENCHMARKS"))
    assert len(listed) == len(set(listed))
    for name in listed:
        assert "print_result(" in (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
