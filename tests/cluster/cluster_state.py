"""What a Ray cluster holds at one moment, as its own state API and the machine's processes tell it."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from dataclasses import dataclass
from typing import Any

import psutil

from tests.cluster.heads import TOKEN, Head
from tests.ray.smoke_place import MARK

RAYS_OWN = {"datasets_stats_actor", "AutoscalingCoordinator", "ActorLocationTracker"}
"""Actors that Ray Data keeps once per cluster, for whoever comes next."""


@dataclass(frozen=True)
class ClusterState:
    """Actors and placement groups that are not gone, and processes that do a job's work."""

    actors: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    processes: list[str]

    def left_behind(self) -> list[str]:
        """What is there beside Ray's own."""
        actors = [actor for actor in self.actors if actor["name"] not in RAYS_OWN]
        # Ray's own processes of the three actors, idle ones that wait for any job, and the agents of a node.
        own = {"ray::IDLE", "ray::_StatsActor", "ray::_AutoscalingCoordinatorActor", "ray::ActorLocationTracker"}
        own |= {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
        processes = [line for line in self.processes if line.split(".")[0].strip() not in own]
        return [*(actor["class_name"] for actor in actors), *(group["state"] for group in self.groups), *processes]

    def gpus_of(self, namespace: str) -> float:
        """GPUs that runs in namespaces beginning so have reserved, or wait for."""
        mine = [actor for actor in self.actors if actor["ray_namespace"].startswith(namespace)]
        jobs = {actor["job_id"] for actor in mine}
        groups = [group for group in self.groups if group["creator_job_id"] in jobs]
        bundles = [bundle["unit_resources"] for group in groups for bundle in group["bundles"]]
        single = [actor["required_resources"] or {} for actor in mine]
        return sum(resources.get("GPU", 0.0) for resources in (*bundles, *single))


def look(head: Head, mark: str) -> ClusterState:
    """Ask a cluster that was started with this mark in its environment."""
    return ClusterState(
        actors=[actor for actor in _listed(head, "actors") if actor["state"] != "DEAD"],
        groups=[group for group in _listed(head, "placement_groups") if group["state"] != "REMOVED"],
        processes=_processes(mark),
    )


def _listed(head: Head, kind: str) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"{head.address}/api/v0/{kind}?detail=1&limit=1000", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
    return found


def _processes(mark: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if process.environ().get(MARK) == mark and ("ray::" in line or "ray_jobs" in line):
                found.append(line.strip())
    return found
