from __future__ import annotations

import json
import re
from pathlib import Path

from ray_jobs.metrics import METRICS


def test_the_dashboard_shows_every_metric_and_no_other(root: Path):
    """A counter is asked for under the name that Ray exports it by."""
    dashboard = (root / "configs/cluster/grafana.json").read_text()
    expressions = [target["expr"] for panel in json.loads(dashboard)["panels"] for target in panel["targets"]]
    shown = set(re.findall(r"ray_(safetydpo_\w+)", " ".join(expressions)))
    exported = {name + ("_total" if metric.kind == "Counter" else "") for name, metric in METRICS.items()}
    assert shown == exported


def test_every_panel_is_of_the_chosen_runs(root: Path):
    content = json.loads((root / "configs/cluster/grafana.json").read_text())
    assert [variable["name"] for variable in content["templating"]["list"]] == ["datasource", "run"]
    for panel in content["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["expr"].count('run=~"$run"') >= 1 for target in panel["targets"])


def test_every_metric_says_what_it_is():
    for name, metric in METRICS.items():
        assert re.fullmatch(r"safetydpo_[a-z_]+", name)
        assert metric.description
        assert not metric.description.endswith(".")
