from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_jobs.cluster import connect, disconnect
from safetydpo.config.schema import Config


@pytest.fixture(scope="session")
def small() -> Config:
    """A run with two workers on a small local Ray."""
    return Config.model_validate({"name": "test", "execution": {"num_workers": 2, "logical_cpus": 4}})


@pytest.fixture(scope="session")
def cluster(small: Config) -> Iterator[None]:
    """A local Ray for all tests of this folder."""
    connect(small)
    yield
    disconnect()


@pytest.fixture(scope="session")
def configs() -> Path:
    """The folder of shipped configs."""
    return Path(__file__).resolve().parents[2] / "configs"
