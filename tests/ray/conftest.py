from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_jobs.cluster import connect, disconnect
from safetydpo.config.schema import Config
from tests.ray.commands import Command

SMALL = Config.model_validate({"name": "test", "execution": {"num_workers": 2, "logical_cpus": 4}})


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start the local Ray again where a command of an earlier test has ended it, before any fixture asks for it."""
    if isinstance(item, pytest.Function) and "cluster" in item.fixturenames:
        connect(SMALL)


@pytest.fixture(scope="session")
def small() -> Config:
    """A run with two workers on a small local Ray."""
    return SMALL


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local Ray for all tests of this folder; `pytest_runtest_setup` has started it."""
    yield
    disconnect()


@pytest.fixture(scope="session")
def configs() -> Path:
    """The folder of shipped configs."""
    return Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], configs: Path, tmp_path: Path
) -> Command:
    """The `safetydpo` command on the smoke config, in a store of its own."""
    return Command(monkeypatch, capsys, configs / "smoke.yaml", tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system (root)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
