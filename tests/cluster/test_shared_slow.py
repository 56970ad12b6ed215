"""Two users on one Ray: neither touches the other, none reserves more than its cap, and nothing of either stays."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.cluster_state import ClusterState, look
from tests.cluster.heads import Head, head_with_token
from tests.ray.smoke_place import MARK, SMOKE, wait_for

pytestmark = pytest.mark.slow
SHORT = [
    "identity.prompts.categories=[violence]",
    "identity.prompts.pairs_per_category=4",
    "identity.prompts.retention_prompts=0",
    "identity.dpo.retention_per_step=0",
    "identity.sampler.steps=2",
]
HALF_GPUS = ["execution.gpus_per_worker=0.5", "execution.num_workers=4", "execution.label_selector={team: a}"]


@dataclass(frozen=True)
class Shared:
    """A head with four GPUs that it only announces, labelled as team a's, and where its temporary files go."""

    head: Head
    mark: str
    temporary: Path

    def look(self) -> ClusterState:
        return look(self.head, self.mark)

    def submit(self, folder: Path, stage: str, *settings: str) -> str:
        places = [f"store={folder}/store", f"run_dir={folder}/run"]
        config = str(SMOKE.relative_to(SMOKE.parents[1]))
        for _ in range(10):
            sent = self.head.safetydpo("submit", config, *places, *SHORT, *settings, "--stage", stage)
            # A new head answers before its agent takes jobs.
            if "No available agent" not in sent.stderr:
                break
            time.sleep(3)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        return sent.stdout.splitlines()[0].removeprefix("sent ")

    def status(self, job: str) -> str:
        return self.head.safetydpo("status", job).stdout.split()[1]

    def left_behind(self) -> list[str]:
        files = [file.name for file in self.temporary.iterdir() if file.name.startswith("safetydpo")]
        return [*self.look().left_behind(), *files]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    temporary, mark = tmp_path_factory.mktemp("t"), uuid.uuid4().hex
    variables = {MARK: mark, "TMPDIR": str(temporary)}
    options = ["--num-gpus=4", "--labels=team=a"]
    with head_with_token(tmp_path_factory.mktemp("head"), options=options, variables=variables) as head:
        yield Shared(head, mark, temporary)


def namespaces(state: ClusterState) -> set[str]:
    return {actor["ray_namespace"] for actor in state.actors if actor["ray_namespace"].startswith("safetydpo-")}


@pytest.mark.long
def test_two_users_with_the_same_config_leave_each_other_and_the_cluster_alone(shared: Shared, tmp_path: Path):
    """Ann trains and is stopped in the middle; Bob's pairs, which the caps of both leave room for, come through."""
    ann = shared.submit(tmp_path / "ann", "train", *HALF_GPUS, "execution.max_gpus=1", "identity.dpo.steps=20000")
    assert wait_for(lambda: any((tmp_path / "ann/store/experts").rglob("attempt-1")), seconds=300)
    bob = shared.submit(
        tmp_path / "bob", "pairs", *HALF_GPUS, "execution.stage_max_gpus={pairs: 0.5}", "identity.sampler.steps=40"
    )
    most: dict[str, float] = {}
    both: set[str] = set()

    def watch() -> bool:
        state = shared.look()
        both.update(namespaces(state))
        for namespace in namespaces(state):
            most[namespace] = max(most.get(namespace, 0.0), state.gpus_of(namespace))
        return len(both) == 2 and min(most.values(), default=0.0) > 0

    assert wait_for(watch, seconds=120), (both, most, shared.head.safetydpo("logs", bob).stdout)
    assert shared.head.safetydpo("stop", ann).returncode == 0
    assert wait_for(lambda: not watch() or shared.status(bob) != "RUNNING", seconds=120)
    assert shared.status(bob) == "SUCCEEDED"
    assert list((tmp_path / "bob/store/pairs").glob("*/record.json"))
    assert max(most.values()) <= 1.0, most
    assert min(most.values()) == 0.5, most
    assert wait_for(lambda: not shared.left_behind(), seconds=20), shared.left_behind()


def test_a_job_that_fails_leaves_nothing(shared: Shared, tmp_path: Path):
    """Pictures were drawn and judged before it finds that too few of them are good."""
    job = shared.submit(tmp_path / "cid", "pairs", "identity.pairs.min_kept_per_category=30")
    assert wait_for(lambda: shared.status(job) in ("FAILED", "SUCCEEDED"), seconds=200)
    assert "expected at least 30 kept pairs" in shared.head.safetydpo("logs", job).stdout
    assert wait_for(lambda: not shared.left_behind(), seconds=20), shared.left_behind()


def test_labels_that_no_node_has_are_refused_in_seconds(shared: Shared, tmp_path: Path):
    job = shared.submit(tmp_path / "dan", "pairs", "execution.label_selector={team: b}")
    assert wait_for(lambda: shared.status(job) == "FAILED", seconds=60)
    said = shared.head.safetydpo("logs", job).stdout
    assert "found 0 in the cluster on nodes of execution.label_selector team=b" in said
