"""The short form of the rehearsal: `ray up` on three hosts, a job by token, and a host cut off while it draws pictures.

The whole matrix of faults is `make test-cluster`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from safetydpo.artifacts.storage import open_location
from tests.cluster.faults import busiest, cut_for, reach
from tests.cluster.hosts import what_is_missing
from tests.cluster.rehearsal import closed_artifacts, pool_rows, rehearsal, store_of
from tests.ray.smoke_place import PATIENCE, Place
from tests.s3_server import BUCKET

MISSING = what_is_missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
CHANGES = ("identity.sampler.batch_size=2", "execution.num_workers=2")


def test_pairs_are_whole_though_a_host_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = Place(tmp_path / "store", tmp_path / "run", changes=CHANGES)
    undisturbed.run("pairs")
    with rehearsal() as cluster:
        for name, value in cluster.server.variables.items():
            monkeypatch.setenv(name, value)
        cluster.up()
        store = open_location(f"s3://{BUCKET}/short/store")
        job = cluster.submit(*store_of("short"), *CHANGES, stage="pairs")
        try:
            reach(job, store, "images /data/")
            cut_for(busiest(cluster.hosts.hosts[1:], "MapWorker"), cluster)
            output, _ = job.communicate(timeout=400 * PATIENCE)
        finally:
            job.kill()
        assert job.returncode == 0, output[-4000:]
        wanted = open_location(str(undisturbed.store))
        assert pool_rows(store) == pool_rows(wanted)
        assert closed_artifacts(store) == closed_artifacts(wanted)
        cluster.down()
