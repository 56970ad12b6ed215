"""`ray up` of the shipped file on three hosts, a job on them, and every fault in turn.

`make test-cluster`; as root. One job goes through the whole matrix, so that each fault meets what earlier ones left.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from safetydpo.artifacts.storage import Location, open_location
from tests.cluster.faults import busiest, cut_for, kill_one, reach
from tests.cluster.heads import Head, head_with_token
from tests.cluster.hosts import BRIDGE, what_is_missing
from tests.cluster.rehearsal import Rehearsal, closed_artifacts, pool_rows, rehearsal, store_of
from tests.ray.smoke_place import PATIENCE, Place, wait_for
from tests.s3_server import BUCKET

MISSING = what_is_missing()
pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]
# Enough of everything that each fault comes in the middle of it; two of everything that may run at once.
CHANGES = (
    "identity.sampler.batch_size=2",
    "identity.search.trials=12",
    "identity.search.generation_size=2",
    "identity.dpo.steps=200",
    "identity.dpo.checkpoint_every=5",
    "execution.num_workers=2",
    "execution.expert_attempts=9",
)
S3_GONE_SECONDS = 60


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Location:
    """The store of the same run on a local disk and a local Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    place = Place(folder / "store", folder / "run", changes=CHANGES)
    place.run("run", seconds=900)
    return open_location(str(place.store))


@pytest.fixture(scope="module")
def bystander(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Another Ray of this machine, outside the hosts."""
    with head_with_token(tmp_path_factory.mktemp("bystander"), num_cpus=1) as head:
        yield head


@pytest.fixture(scope="module")
def cluster(bystander: Head, undisturbed: Location) -> Iterator[Rehearsal]:
    """Three hosts with Ray on them; the bystander is alive before, and after all is gone."""
    with pytest.MonkeyPatch.context() as patch, rehearsal() as found:
        for name, value in found.server.variables.items():
            patch.setenv(name, value)
        found.up()
        yield found
        found.down()
    assert bystander.safetydpo("status").returncode == 0
    left = subprocess.run(["ip", "link", "show", BRIDGE], capture_output=True, check=False)
    assert left.returncode != 0
    assert not [*Path("/var/tmp").glob("safetydpo-hosts-*"), *Path("/var/tmp").glob("safetydpo-s3-*")]
    assert not list(Path("/run/netns").glob("sdpo-*"))


def repeats(store: Location) -> int:
    """Return how many attempts at experts were begun beyond their first."""
    numbers = [file.path.rsplit("-", 1)[1] for file in (store / "experts").walk() if "/lease/attempt-" in file.path]
    return sum(number.isdigit() and number != "1" for number in numbers)


def test_one_job_survives_every_fault(cluster: Rehearsal, undisturbed: Location) -> None:
    """Hosts cut off in generation, training and search; a worker, a lane's worker and driver and a raylet killed; S3
    gone for a minute. A host is cut off with a process of that stage on it.
    """
    workers = cluster.hosts.hosts[1:]
    store = open_location(f"s3://{BUCKET}/faults/store")
    job = cluster.submit(*store_of("faults"), *CHANGES)

    def note(text: str) -> None:
        print(f"{time.time() - started:6.1f} s  {text}", flush=True)

    started = time.time()
    try:
        reach(job, store, "images /data/")
        note("generation: a host is cut off")
        cut_for(busiest(workers, "MapWorker"), cluster)
        note(f"generation: killed {kill_one(workers, 'MapWorker')}")
        reach(job, store, "experts attempt-1/ checkpoint.safetensors")
        for number, what in enumerate(("RayTrainWorker", "TrainController")):
            note(f"training: killed {kill_one(workers, what)}")
            assert wait_for(lambda number=number: repeats(store) > number, seconds=120), "nobody began again"
        note("training: a host is cut off")
        before = repeats(store)
        cut_for(busiest(workers, "RayTrainWorker"), cluster)
        assert wait_for(lambda: repeats(store) > before, seconds=120), "nobody began again"
        reach(job, store, "merged record.json")
        workers[1].find("raylet/raylet")[0].kill()
        note("merging: killed a raylet")
        reach(job, store, "search trials")
        note("search: S3 is gone for a minute")
        cluster.server.kill()
        time.sleep(S3_GONE_SECONDS)
        cluster.server.start()
        assert wait_for(lambda: cluster.alive() == 3, seconds=120), f"{cluster.alive()} nodes"
        note("search: a host is cut off")
        cut_for(busiest(workers, "MergeTrial"), cluster)
        output, _ = job.communicate(timeout=900 * PATIENCE)
        note(f"the job ended with {job.returncode}")
    finally:
        job.kill()
    assert job.returncode == 0, output[-4000:]
    assert pool_rows(store) == pool_rows(undisturbed)
    assert closed_artifacts(store) == closed_artifacts(undisturbed)
