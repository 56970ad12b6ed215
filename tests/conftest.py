"""What every test shares: shapes and types of the pure functions are checked while the tests run."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

from ray_jobs.run_context import OUR_LOGGERS
from safetydpo.artifacts.storage import Location, open_location
from tests.checked_modules import CHECKED_MODULES
from tests.s3_server import BUCKET, S3Server

_early = [name for name in CHECKED_MODULES if name in sys.modules]
if _early:
    raise RuntimeError(
        f"expected the shape checks before the first import of {_early}: import less in tests/conftest.py"
    )
install_import_hook(list(CHECKED_MODULES), "beartype.beartype")

# A slow machine is no failure of a property.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

ROOT = Path(__file__).resolve().parents[1]
LONGEST = (
    "chain",
    "search",
    "s3",
    "jobs",
    "rehearsal",
    "granularity",
    "lanes",
    "evidence",
    "node_loss",
    "shared",
    "reference_errors",
    "generate_pairs",
    "attack_prompts",
)
"""Slow files `test_NAME_slow.py` that take minutes: begun first, so that no process ends long after the others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order is kept by `--no-loadscope-reorder`."""
    places = {f"test_{name}_slow.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """Spare Python's garbage collector the million objects of all modules and tests at each of its rounds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def store(tmp_path: Path) -> Location:
    """An empty local store."""
    return open_location(str(tmp_path / "store"))


@pytest.fixture(autouse=True)
def our_handlers() -> Iterator[None]:
    """No test leaves a handler of our loggers to the next one, whose stderr it would write to."""
    loggers = [logging.getLogger(name) for name in OUR_LOGGERS]
    before = [list(logger.handlers) for logger in loggers]
    yield
    for logger, handlers in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers


@pytest.fixture
def caplog(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, our_handlers: None
) -> pytest.LogCaptureFixture:
    """pytest's own, which sees our loggers whatever a library that an earlier test loaded has done to all loggers.

    Seen: a warning of ours went to stderr, and the root logger, where pytest listens, did not get it.
    """
    ours = [logging.getLogger(name) for name in OUR_LOGGERS]
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name.split(".")[0] in OUR_LOGGERS:
            monkeypatch.setattr(logger, "disabled", False)
            monkeypatch.setattr(logger, "propagate", logger not in ours)
            caplog.set_level(logging.NOTSET, logger=name)
    for logger in ours:
        # Here instead of by the root, so that nothing comes twice.
        logger.addHandler(caplog.handler)
    return caplog


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One S3 server for all tests that only read and write; those that kill it start their own."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def s3_store(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    """An empty store in its bucket; the environment leads there."""
    for name, value in s3_server.variables.items():
        monkeypatch.setenv(name, value)
    return open_location(f"s3://{BUCKET}/{tmp_path.name}/store")


# Equal bytes are promised for a pinned number of threads, which is 1 per worker unless the config says otherwise.
torch.set_num_threads(1)
