"""What Prometheus would read of a run: scraped from the agent of a real local Ray's node."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest
import ray

from ray_jobs.metrics import METRICS, count, gpu_utilisation, set_gauge
from ray_jobs.run_context import within
from tests.ray.smoke_place import wait_for

pytestmark = pytest.mark.slow


def scrape() -> str:
    """Return what the only node exports."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


@pytest.mark.usefixtures("cluster")
def test_every_metric_is_exported_under_the_names_of_the_dashboard(root: Path):
    """A counter may be told under the name of its sum; all of them bear the run and its stage."""
    with within(run="smoke-1", stage="train"):
        for name, metric in METRICS.items():
            tags = dict.fromkeys(metric.tags, "experts")
            if metric.kind == "Gauge":
                set_gauge(name, 0.25, **tags)
            else:
                count(name, 3, **tags)
    # Outside of a run nothing is exported.
    set_gauge("safetydpo_best_objective", 7.5)
    dashboard = (root / "configs/cluster/grafana.json").read_text()
    wanted = set(re.findall(r"ray_safetydpo_\w+", dashboard))
    seen: list[str] = [""]

    def is_there() -> bool:
        seen[0] = scrape()
        return all(re.search(rf"^{name}{{", seen[0], re.MULTILINE) for name in wanted)

    assert wait_for(is_there, seconds=60), (wanted, re.findall(r"^ray_safetydpo.*$", seen[0], re.MULTILINE))
    ours = re.findall(r"^ray_safetydpo.*$", seen[0], re.MULTILINE)
    assert all('run="smoke-1"' in line and 'stage="train"' in line for line in ours), ours
    assert not any(line.endswith("7.5") for line in ours)
    assert json.loads(dashboard)["uid"] == "safetydpo"


def test_a_machine_without_a_gpu_tells_nothing_of_one():
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert gpu_utilisation() is None
