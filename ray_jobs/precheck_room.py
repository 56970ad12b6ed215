"""How much work a cluster can ever hold: the nodes it has, and those that its autoscaler may add. Pure but for `read`.

The autoscaler's limits are read from two places, and are unknown where neither is there: what it reported to Ray's
control service, and the cluster file that `ray up` leaves on the head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_jobs.resources import own_nodes
from safetydpo.config.safe_yaml import YamlError, parse_yaml
from safetydpo.config.schema import ExecutionConfig
from safetydpo.errors import UsageError

HEAD_FILE = Path("~/ray_bootstrap_config.yaml")
"""What `ray up` copies to the head; only a driver that runs there, as jobs do, can see it."""
_SLACK = 1e-6


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind that an autoscaler may have at once."""

    resources: Mapping[str, float]
    max_count: float
    """infinity = no limit."""


@dataclass(frozen=True)
class Room:
    """What a cluster has, and what it can come to have."""

    nodes: tuple[Mapping[str, float], ...]
    """Resources of each node that is alive."""
    types: tuple[NodeType, ...] = ()
    """What the autoscaler may hold; empty = no autoscaler that is known of."""
    max_nodes: float = math.inf
    """Of all types together."""
    head: Mapping[str, float] = field(default_factory=dict)
    """What the head has beside those."""

    def has(self, resource: str) -> float:
        """Return how much there is now."""
        return sum(node.get(resource, 0.0) for node in self.nodes)

    def most(self, resource: str) -> float:
        """Return how much there can ever be, as far as is known: the richest types first, up to the limits."""
        left, total = self.max_nodes, self.head.get(resource, 0.0)
        for kind in sorted(self.types, key=lambda kind: -kind.resources.get(resource, 0.0)):
            amount = kind.resources.get(resource, 0.0)
            count = min(kind.max_count, left)
            if amount > 0 and count > 0:
                total += amount * count
                left -= count
        return max(self.has(resource), total)

    def fits_on_a_node(self, needs: Mapping[str, float]) -> bool:
        """Return whether some node, there or to come, can hold all of `needs` at once."""
        kinds = [*self.nodes, *(kind.resources for kind in self.types if kind.max_count > 0)]
        return any(all(kind.get(name, 0.0) + _SLACK >= amount for name, amount in needs.items()) for kind in kinds)


def check_fit(execution: ExecutionConfig, room: Room) -> None:
    """See that each process, and each expert's processes together, fit on one node.

    Raises:
        UsageError: expected, found, what to do.
    """
    each = {"CPU": execution.cpus_per_worker, "GPU": execution.gpus_per_worker}
    workers = execution.workers_per_expert
    for count, settings in (
        (1, "execution.cpus_per_worker, gpus_per_worker"),
        (workers, "execution.workers_per_expert times cpus_per_worker, gpus_per_worker"),
    ):
        needs = {name: count * amount for name, amount in each.items() if amount > 0}
        if not room.fits_on_a_node(needs):
            raise UsageError(
                f"expected a node with {_amounts(needs)} ({settings}), found at most {_largest(room, needs)} on one: "
                "lower them, or add larger nodes"
            )


def _amounts(needs: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}s" for name, amount in needs.items())


def _largest(room: Room, needs: Iterable[str]) -> str:
    kinds = [*room.nodes, *(kind.resources for kind in room.types if kind.max_count > 0)]
    return _amounts({name: max((kind.get(name, 0.0) for kind in kinds), default=0.0) for name in needs})


def read_room(execution: ExecutionConfig) -> Room:
    """Return the room that the cluster which this process is connected to has for a run.

    Nodes that `execution.label_selector` leaves out do not count; those that an autoscaler may add do, since what
    labels they will have is not known.
    """
    import ray
    from ray._private.state import state

    nodes = tuple(dict(node["Resources"]) for node in own_nodes(ray.nodes(), execution))
    reported = state.get_cluster_config()
    if reported is not None and reported.node_group_configs:
        types = tuple(
            NodeType(dict(group.resources), math.inf if group.max_count < 0 else group.max_count)
            for group in reported.node_group_configs
        )
        return Room(nodes, types)
    return room_of_file(HEAD_FILE.expanduser(), nodes)


def room_of_file(path: Path, nodes: tuple[Mapping[str, float], ...]) -> Room:
    """Return the room of a cluster with these nodes and the limits of its cluster file; none without a file.

    Raises:
        UsageError: if the file is there and cannot be read.
    """
    if not path.is_file():
        return Room(nodes)
    try:
        content: Any = parse_yaml(path.read_text(encoding="utf-8"))
        head, most = content["head_node_type"], float(content["max_workers"])
        resources = {
            name: {str(key): float(value) for key, value in (kind.get("resources") or {}).items()}
            for name, kind in content["available_node_types"].items()
        }
        limits = {
            name: float(kind.get("max_workers", 0 if name == head else most))
            for name, kind in content["available_node_types"].items()
        }
    except (OSError, UnicodeDecodeError, YamlError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"expected the cluster file that `ray up` left at {path}, found: {' '.join(str(error).split())[:200]}; "
            "run `ray up` again, or remove it"
        ) from error
    # The types of a local provider name no resources: what its hosts have is seen when they join.
    types = tuple(NodeType(resources[name], limits[name]) for name in resources if resources[name] and limits[name])
    return Room(nodes, types, most, resources.get(head, {})) if types else Room(nodes)
