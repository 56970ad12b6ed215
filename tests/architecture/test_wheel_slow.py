"""What `python -m build` makes holds all that the package reads, and works where no clone is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from safetydpo.config.schema import BaseModelConfig
from safetydpo.demo.concepts import load_world
from safetydpo.diffusion.build import base_fingerprint
from safetydpo.evaluation.summary import dump_summary
from tests.architecture.source import PACKAGES, ROOT, files_of_the_project
from tests.evaluation.summaries import rate, row, summary_of

pytestmark = pytest.mark.slow
LOADS_WHAT_IT_SHIPS = """
import json, pathlib, sys
import ray_jobs, safetydpo
from safetydpo.config.schema import BaseModelConfig
from safetydpo.demo.concepts import load_world
from safetydpo.diffusion.build import base_fingerprint
from safetydpo.evaluation.report import render_report
from safetydpo.evaluation.summary import parse_summary
summary = parse_summary(pathlib.Path(sys.argv[1]).read_text())
print(json.dumps({
    "places": [ray_jobs.__file__, safetydpo.__file__],
    "fingerprint": base_fingerprint(BaseModelConfig()),
    "concepts": len(load_world().concepts),
    "page": render_report(summary)[:15],
}))
"""
"""Reads weights, YAML, the schema and the templates."""


@dataclass(frozen=True)
class Unpacked:
    """A wheel, unpacked into a folder of its own."""

    wheel: Path
    folder: Path

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python far from the clone, with the unpacked wheel before all that is installed."""
        (elsewhere := self.folder.parent / "elsewhere").mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": str(self.folder), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `safetydpo ARGUMENTS`."""
        return self.python("-m", "ray_jobs.cli", *arguments)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Unpacked:
    """A source archive of what git holds, and a wheel of that archive: what `python -m build` does, without network."""
    folder = tmp_path_factory.mktemp("wheel")
    for file in files_of_the_project():
        copy = folder / "clone" / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "clone")],
        # The build must not find the modules of this clone.
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = (folder / "dist").glob("safetydpo-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return Unpacked(wheel, folder / "unpacked")


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(unpacked: Unpacked) -> None:
    """Code, weights, templates, YAML and the schema of the summary; no test, no benchmark."""
    wanted = {str(path) for file in files_of_the_project() if (path := file.relative_to(ROOT)).parts[0] in PACKAGES}
    held = {str(file.relative_to(unpacked.folder)) for file in unpacked.folder.rglob("*") if file.is_file()}
    assert {name for name in held if ".dist-info/" not in name} == wanted
    for ending in (".safetensors", ".j2", ".css", ".js", ".yaml", ".json", "merges.txt", "py.typed"):
        assert any(name.endswith(ending) for name in wanted)
    assert unpacked.wheel.stat().st_size < 40_000_000


def test_it_knows_its_command_licence_and_extras(unpacked: Unpacked) -> None:
    (info,) = unpacked.folder.glob("*.dist-info")
    assert "safetydpo = ray_jobs.cli:main" in (info / "entry_points.txt").read_text()
    metadata = (info / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Provides-Extra: nsfw" in metadata
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_package_works_from_the_wheel_alone(unpacked: Unpacked, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    file.write_text(dump_summary(summary_of([row("base", {"ip": rate(9, 10)}, kind="base")])))
    done = unpacked.python("-c", LOADS_WHAT_IT_SHIPS, str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {
        "places": [str(unpacked.folder / package / "__init__.py") for package in reversed(PACKAGES)],
        "fingerprint": base_fingerprint(BaseModelConfig()),
        "concepts": len(load_world().concepts),
        "page": "<!DOCTYPE html>",
    }


def test_its_commands_work_where_no_clone_is(unpacked: Unpacked) -> None:
    """Help, the shipped YAML files, the weights; only the configs are the clone's."""
    shown = unpacked.command("--help")
    assert shown.returncode == 0, shown.stderr
    assert "doctor" in shown.stdout
    listed = unpacked.command("benchmarks", "list")
    assert listed.returncode == 0, listed.stderr
    for file in (ROOT / "safetydpo" / "prompts" / "benchmarks").glob("*.yaml"):
        assert file.stem in listed.stdout
    checked = unpacked.command("doctor")
    assert "missing" not in next(line for line in checked.stdout.splitlines() if "demo weights" in line)
    refused = unpacked.command("demo")
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: expected configs/demo.yaml in this folder, found none: run from a clone of the project\n"
    )
