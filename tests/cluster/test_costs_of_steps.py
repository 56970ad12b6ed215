"""The costs in docs/cluster.md are those of the shipped price table and cluster file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

CORES = {"m6i.2xlarge": 8}
GPUS = {"g5.2xlarge": "a10g"}
HOURS_OF_A_MONTH = 730


@pytest.fixture
def costs(root: Path) -> dict[str, float]:
    """What each row of the table should say: hours times machines times prices."""
    prices = yaml.safe_load((root / "configs" / "cluster" / "costs.yaml").read_text())
    cluster = yaml.safe_load((root / "cluster.yaml").read_text())
    types = cluster["available_node_types"]
    machines, stored = prices["machines"], prices["storage_per_gb_month"]

    def hour(spot: int, on_demand: int) -> float:
        def disk(name: str) -> float:
            (mapping,) = types[name]["node_config"]["BlockDeviceMappings"]
            return float(mapping["Ebs"]["VolumeSize"] * stored / HOURS_OF_A_MONTH)

        def worker(name: str, price: str) -> float:
            kind = GPUS[types[name]["node_config"]["InstanceType"]]
            return float(machines[kind][price]) + disk(name)

        head = CORES[types["head"]["node_config"]["InstanceType"]] * machines["core"]["on_demand"] + disk("head")
        return head + spot * worker("gpu_spot", "spot") + on_demand * worker("gpu_on_demand", "on_demand")

    least = types["gpu_spot"]["min_workers"] + types["gpu_on_demand"]["min_workers"]
    dear: Any = types["gpu_on_demand"]["max_workers"]
    return {
        "1. bucket and roles": stored,
        "2. network": 0,
        "3. token, package, file": 0,
        "4. launch and look": 0.5 * hour(least, 0),
        "5. run, each hour, at least": hour(least, 0),
        "5. run, each hour, at most": hour(cluster["max_workers"] - dear, dear),
        "6. report and end": 0.25 * hour(least, 0),
    }


def test_the_docs_say_what_each_step_costs(root: Path, costs: dict[str, float]):
    text = (root / "docs" / "cluster.md").read_text()
    rows = re.findall(r"^\| (\d\. [^|]+) \| [^|]+ \| ([\d.]+) \|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == list(costs)
    for name, said in rows:
        places = len(said.partition(".")[2])
        assert float(said) == pytest.approx(costs[name], abs=0.5000001 * 10**-places), name
    said = dict(rows)
    whole = sum(
        float(said[name]) for name in ("4. launch and look", "5. run, each hour, at least", "6. report and end")
    )
    assert f"one hour on the two workers is {whole:.2f}" in text


def test_what_is_signed_holds_the_page_that_was_read(root: Path):
    (line,) = re.findall(r"^.*gpg --clearsign.*$", (root / "docs" / "cluster.md").read_text(), re.MULTILINE)
    assert {"merged/*.safetensors", "report/summary.json", "report/index.html"} <= set(line.split())
