"""`safetydpo pairs` onto a real S3 server: as on a disk, also when the server is killed or gone for half a minute."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from safetydpo.artifacts.storage import Location, open_location
from tests.ray.smoke_place import PATIENCE, ROOT, Place, wait_for
from tests.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server

pytestmark = pytest.mark.slow
# 24 pictures in batches of two: a dozen write tasks of which some are under way whenever the server goes.
TINY = (
    "identity.prompts.categories=[violence]",
    "identity.prompts.pairs_per_category=8",
    "identity.prompts.retention_prompts=8",
    "identity.sampler.batch_size=2",
    "execution.num_workers=1",
)
GONE_SECONDS = 30


@dataclass(frozen=True)
class S3Place(Place):
    """A store and a run folder below one bucket of a server."""

    server: S3Server | None = None

    @property
    def settings(self) -> list[str]:
        """The settings that put a run there."""
        return [f"store=s3://{BUCKET}/store", f"run_dir=s3://{BUCKET}/runs/{{name}}", *self.changes]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the commands: where S3 is, and with what."""
        assert self.server is not None
        return {**super().environment, **self.server.variables}

    @property
    def location(self) -> Location:
        """The store as this process sees it; its environment leads to the server too."""
        return open_location(f"s3://{BUCKET}/store")

    def artifacts(self, stage: str) -> dict[str, str]:
        """Every closed pairs artifact: {folder: fingerprint}."""
        records = {folder.name: folder / "record.json" for folder in (self.location / "pairs").list()}
        return {f"pairs/{name}": json.loads(file.read_bytes())["fingerprint"] for name, file in records.items()}

    def pool_rows(self, stage: str) -> dict[str, list[dict[str, Any]]]:
        """Every row of every data file of the pools, sorted: {pool: rows}; open batches are none of a finished run."""
        found: dict[str, list[dict[str, Any]]] = {}
        for folder in ("images", "verdicts", "latents", "captions"):
            for pool in (self.location / folder).list():
                rows = found.setdefault(f"{folder}/{pool.name}", [])
                for batch in pool.list():
                    assert (batch / "record.json").is_file()
                    assert not (batch / "checkpoint").exists()
                    for file in (batch / "data").walk():
                        with file.open_random_access() as source:
                            rows += pq.ParquetFile(source).read().to_pylist()
        return {pool: sorted(rows, key=lambda row: str(next(iter(row.values())))) for pool, rows in found.items()}

    def has_rows(self, folder: str) -> bool:
        """Whether a first file of a pool's rows stands there."""
        files = (file for pool in (self.location / folder).list() for file in pool.walk())
        return any("/data/" in file.path for file in files)

    def start(self) -> subprocess.Popen[str]:
        """Start `safetydpo pairs` and return while it writes pictures."""
        process = subprocess.Popen(
            self.command("pairs"),
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert wait_for(lambda: self.has_rows("images") or process.poll() is not None, seconds=240), "none in time"
        assert process.poll() is None, process.communicate()[0]
        return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The same pairs on a local disk."""
    folder = tmp_path_factory.mktemp("local")
    place = Place(folder / "store", folder / "run", changes=TINY)
    place.run("pairs")
    return place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Place]:
    """An empty bucket of a server that may be killed."""
    server = S3Server(tmp_path / "s3")
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    place = S3Place(tmp_path, tmp_path, changes=TINY, server=server)
    try:
        server.start()
        yield place
    finally:
        for survivor in place.processes():
            with contextlib.suppress(Exception):
                survivor.kill()
        server.stop()


def assert_as_undisturbed(place: S3Place, undisturbed: Place) -> None:
    """Each id once in every pool, equal rows and equal artifacts; no credential in any object or log."""
    rows = place.pool_rows("pairs")
    for pool, found in rows.items():
        ids = [next(iter(row.values())) for row in found]
        assert len(set(ids)) == len(ids), f"doubled rows in {pool}"
    assert rows == undisturbed.pool_rows("pairs")
    assert place.artifacts("pairs") == undisturbed.artifacts("pairs")
    for file in open_location(f"s3://{BUCKET}").walk():
        content = file.read_bytes()
        assert ACCESS_KEY.encode() not in content
        assert SECRET_KEY.encode() not in content


@pytest.mark.long
def test_pairs_on_s3_are_those_of_a_disk(place: S3Place, undisturbed: Place):
    place.run("pairs")
    assert_as_undisturbed(place, undisturbed)
    pointers = json.loads((open_location(f"s3://{BUCKET}/runs/smoke") / "artifacts.json").read_bytes())
    assert pointers["artifacts"]["pairs"]["stage"] == "pairs"
    # Again: nothing is made, and no Ray is started for it.
    assert place.run("pairs") < 30 * PATIENCE
    assert_as_undisturbed(place, undisturbed)


@pytest.mark.long
def test_server_and_command_killed_in_mid_write_then_the_same_command(place: S3Place, undisturbed: Place):
    process = place.start()
    assert place.server is not None
    place.server.kill()
    # Some requests are in flight now and find nobody; then the machine of the command goes too.
    time.sleep(2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert wait_for(lambda: not place.processes(), seconds=60)
    place.server.start()
    place.run("pairs")
    assert_as_undisturbed(place, undisturbed)


def test_s3_gone_for_half_a_minute_ends_no_run(place: S3Place, undisturbed: Place):
    """First it does not answer, while pictures are written; then it is killed, while they are judged."""
    process = place.start()
    assert place.server is not None
    place.server.pause()
    time.sleep(GONE_SECONDS)
    place.server.go_on()
    assert wait_for(lambda: place.has_rows("verdicts") or process.poll() is not None, seconds=240)
    assert process.poll() is None, process.communicate()[0]
    place.server.kill()
    time.sleep(GONE_SECONDS)
    place.server.start()
    output, _ = process.communicate(timeout=400 * PATIENCE)
    assert process.returncode == 0, output[-3000:]
    assert_as_undisturbed(place, undisturbed)
