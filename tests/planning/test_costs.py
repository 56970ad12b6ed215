from __future__ import annotations

from pathlib import Path

import pytest

from safetydpo.errors import UsageError
from safetydpo.planning.costs import CostTable, load_costs

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "cluster" / "costs.yaml"
TABLE = CostTable.model_validate(
    {
        "machines": {
            "core": {"device": "cpu", "on_demand": 0.1},
            "big": {"device": "gpu", "on_demand": 4, "spot": 2},
            "small": {"device": "gpu", "on_demand": 1},
        },
        "speeds": [
            {"base": "m", "machine": "big", "height": 64, "width": 64, "passes_per_second": 10, "source": "seen"},
            {"base": "m", "machine": "small", "height": 64, "width": 64, "passes_per_second": 2, "source": "seen"},
        ],
    }
)


def test_the_shipped_example_parses_and_says_what_it_is() -> None:
    table = load_costs(SHIPPED)
    assert {machine.device for machine in table.machines.values()} == {"gpu", "cpu"}
    assert all(machine.spot is not None and machine.spot < machine.on_demand for machine in table.machines.values())
    assert "EXAMPLES TO EDIT" in SHIPPED.read_text()
    assert [one.workers for one in table.speed_up if one.source == "measured"] == [1], "nobody has measured the others"


def test_machines_are_found_by_name_or_by_device() -> None:
    found = TABLE.machine("gpu")
    assert found is not None
    assert found[0] == "big"
    assert TABLE.machine("gpu", "small") == ("small", TABLE.machines["small"])
    assert CostTable().machine("gpu") is None


def test_a_machine_without_the_device_is_refused() -> None:
    with pytest.raises(UsageError, match="with a GPU, which this run asks for, found 'core'; there are: big, small"):
        TABLE.machine("gpu", "core")


def test_the_speed_of_another_machine_is_better_than_none() -> None:
    for machine, found in (("small", "small"), ("big", "big"), ("unknown", "big"), (None, "big")):
        speed = TABLE.speed("m", height=64, width=64, machine=machine)
        assert speed is not None
        assert speed.machine == found
    assert TABLE.speed("m", height=128, width=64, machine="big") is None
    assert TABLE.speed("other", height=64, width=64, machine="big") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speed_up: [{workers: 2, times: 2, source: measured}]", "speed_up: expected rising numbers of workers from 1"),
        ("speed_up: [{workers: 1, times: 2, source: measured}]", "which is 1 times as fast as itself"),
        ("machines: {h100: {device: tpu, on_demand: 1}}", "machines.h100.device"),
        ("machines: {h100: {device: gpu, on_demand: -1}}", "machines.h100.on_demand"),
        ("price: 3", "expected known keys only, found 'price'"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "costs.yaml").write_text(text)
    with pytest.raises(UsageError, match=said):
        load_costs(tmp_path / "costs.yaml")


def test_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a price table at .*, found nothing; name one with --costs"):
        load_costs(tmp_path / "none.yaml")
