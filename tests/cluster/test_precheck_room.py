"""What a cluster can ever hold, from its nodes and from its autoscaler's limits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.precheck_room import NodeType, Room, check_fit, room_of_file
from safetydpo.config.schema import ExecutionConfig
from safetydpo.errors import UsageError

SMALL, LARGE = {"CPU": 8.0, "GPU": 1.0}, {"CPU": 32.0, "GPU": 4.0}


def test_limits_are_filled_with_the_richest_type_first():
    """At most 5 nodes: 2 large and 3 small = 2 x 4 + 3 x 1 = 11 GPUs; 2 x 32 + 3 x 8 = 88 CPUs. Two small are there."""
    room = Room((SMALL, SMALL), (NodeType(SMALL, 8), NodeType(LARGE, 2)), max_nodes=5)
    assert (room.has("GPU"), room.most("GPU")) == (2, 11)
    assert (room.has("CPU"), room.most("CPU")) == (16, 88)
    assert room.most("TPU") == 0


def test_without_an_autoscaler_there_is_what_is_there():
    assert Room((SMALL, LARGE)).most("GPU") == 5


def test_no_limit():
    assert Room((), (NodeType(SMALL, math.inf),)).most("GPU") == math.inf


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=4),
    st.integers(0, 6),
    st.lists(st.integers(0, 4), max_size=3),
)
def test_the_most_is_that_of_trying_every_choice(types: list[tuple[int, int]], limit: int, there: list[int]):
    """Against choosing each number of nodes of each type."""

    def best(left: list[tuple[int, int]], nodes: int) -> int:
        if not left:
            return 0
        (amount, count), rest = left[0], left[1:]
        return max(taken * amount + best(rest, nodes - taken) for taken in range(min(count, nodes) + 1))

    room = Room(
        tuple({"GPU": float(amount)} for amount in there),
        tuple(NodeType({"GPU": float(amount)}, count) for amount, count in types),
        max_nodes=limit,
    )
    assert room.most("GPU") == max(sum(there), best(types, limit))


def test_a_process_must_fit_on_one_node_and_so_must_those_of_an_expert():
    """Two nodes of one GPU are two GPUs, and no place for a process that wants two, or for two that belong together."""
    room = Room((SMALL, SMALL))
    check_fit(ExecutionConfig(gpus_per_worker=1, cpus_per_worker=8), room)
    check_fit(ExecutionConfig(gpus_per_worker=0.5, workers_per_expert=2), room)
    with pytest.raises(
        UsageError,
        match=r"expected a node with 1 CPUs and 2 GPUs \(execution\.cpus_per_worker, gpus_per_worker\), found at "
        "most 8 CPUs and 1 GPUs on one: lower them, or add larger nodes",
    ):
        check_fit(ExecutionConfig(gpus_per_worker=2), room)
    with pytest.raises(UsageError, match=r"with 2 CPUs and 2 GPUs \(execution\.workers_per_expert times"):
        check_fit(ExecutionConfig(gpus_per_worker=1, workers_per_expert=2), room)
    check_fit(ExecutionConfig(gpus_per_worker=1, workers_per_expert=2), Room((SMALL,), (NodeType(LARGE, 1),)))
    with pytest.raises(UsageError, match="found at most 8 CPUs and 1 GPUs on one"):
        check_fit(ExecutionConfig(gpus_per_worker=4), Room((SMALL,), (NodeType(LARGE, 0),)))
    with pytest.raises(UsageError, match="found at most 0 CPUs on one"):
        check_fit(ExecutionConfig(), Room(()))


def test_a_fraction_above_one_is_refused_before_anything_is_asked():
    with pytest.raises(
        ValueError, match=r"gpus_per_worker: expected a fraction in \(0, 1\] or a whole number, found 1\.5"
    ):
        ExecutionConfig(gpus_per_worker=1.5)


def test_the_limits_that_ray_up_leaves_on_the_head(root: Path, tmp_path: Path):
    """The shipped AWS file: 8 workers at most, of one GPU each, beside a head without CPUs."""
    from ray.autoscaler._private.util import prepare_config

    path = tmp_path / "ray_bootstrap_config.yaml"
    prepared = prepare_config(yaml.safe_load((root / "cluster.yaml").read_text()))
    path.write_text(yaml.safe_dump(prepared))
    room = room_of_file(path, ())
    assert (room.most("GPU"), room.most("CPU")) == (8, 64)
    assert room_of_file(tmp_path / "none.yaml", (SMALL,)) == Room((SMALL,))


def test_a_head_counts_beside_its_workers(tmp_path: Path):
    """4 CPUs of the head and 2 workers of 8: 20."""
    path = tmp_path / "ray_bootstrap_config.yaml"
    kinds = {"head": {"resources": {"CPU": 4}, "max_workers": 0}, "worker": {"resources": {"CPU": 8}}}
    path.write_text(yaml.safe_dump({"max_workers": 2, "head_node_type": "head", "available_node_types": kinds}))
    assert room_of_file(path, ()).most("CPU") == 20


def test_hosts_of_ones_own_say_nothing_of_what_they_have(tmp_path: Path):
    path = tmp_path / "ray_bootstrap_config.yaml"
    kinds = {"local.cluster.node": {"resources": {}, "node_config": {}, "max_workers": 2}}
    path.write_text(
        yaml.safe_dump({"max_workers": 2, "head_node_type": "local.cluster.node", "available_node_types": kinds})
    )
    assert room_of_file(path, (SMALL,)) == Room((SMALL,))


@pytest.mark.parametrize(
    "text", ["a: [", "- 1", "max_workers: 3", "available_node_types: {a: 1}\nmax_workers: 1\nhead_node_type: a"]
)
def test_a_broken_file_of_the_head(tmp_path: Path, text: str):
    path = tmp_path / "ray_bootstrap_config.yaml"
    path.write_text(text)
    with pytest.raises(
        UsageError, match="expected the cluster file that `ray up` left at .*, found: .*; run `ray up` again"
    ):
        room_of_file(path, ())
