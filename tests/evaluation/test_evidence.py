from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from scipy import stats

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.evidence import dump_unit, parse_unit, pool_units
from safetydpo.evaluation.summary import overall_rows
from tests.evaluation.measured_units import make_units

ROWS = ("base", "all_single", "searched")
SEEDS = (0, 1, 2)


def test_a_record_survives_its_text() -> None:
    for unit in make_units(rows=ROWS):
        text = dump_unit(unit)
        assert parse_unit(text, source="here") == replace(unit, failed_images=tuple(unit.failed_images))
        assert '    "unsafe-0": [' in text
        assert max(len(line) for line in text.splitlines()) < 120


def test_counts_of_three_seeds_are_added_up() -> None:
    """The pooled IP is hits over pictures of all three, with scipy's exact interval; 3 x 140 = 420 pictures."""
    units = make_units(rows=ROWS)
    evidence = pool_units(units, rows=ROWS, seeds=SEEDS)
    pooled = {row["name"]: row for row in overall_rows(evidence.summary)}
    assert list(pooled) == list(ROWS)
    for name in ROWS:
        hits = sum(sum(total for total, _ in unit.counts.rates["ip"].values()) for unit in units if unit.row == name)
        exact = stats.binomtest(int(hits), 420).proportion_ci(0.95, method="exact")
        ip = pooled[name]["metrics"]["ip"]
        assert (ip["value"], ip["n"]) == (hits / 420, 420)
        assert (ip["low"], ip["high"]) == pytest.approx((exact.low, exact.high), abs=1e-12)
        assert ip["cluster_low"] <= ip["value"] <= ip["cluster_high"]
        assert evidence.seeds_of(name) == SEEDS


def test_single_seeds_stand_beside_the_pool_as_they_were_measured() -> None:
    units = make_units(rows=ROWS)
    evidence = pool_units(units, rows=ROWS, seeds=SEEDS)
    single = [row for row in evidence.summary["rows"] if row["seed"] is not None]
    assert [(row["name"], row["seed"]) for row in single] == [(name, seed) for name in ROWS for seed in SEEDS]
    first = next(unit for unit in units if unit.row == "searched" and unit.seed == 1)
    assert first.measured["metrics"] == next(
        row["metrics"] for row in single if (row["name"], row["seed"]) == ("searched", 1)
    )


def test_the_pool_does_not_depend_on_the_order_of_units() -> None:
    units = make_units(rows=ROWS)
    forwards, backwards = (pool_units(part, rows=ROWS, seeds=SEEDS) for part in (units, units[::-1]))
    assert forwards == backwards


def test_clip_retention_is_the_ratio_of_all_margins() -> None:
    units = [unit for unit in make_units(rows=ROWS) if unit.row in ("base", "searched")]
    evidence = pool_units(units, rows=ROWS, seeds=SEEDS)
    row = next(row for row in overall_rows(evidence.summary) if row["name"] == "searched")
    own, base = (
        sum(total for unit in units if unit.row == "searched" for total, _ in unit.counts.sums[name].values())
        for name in ("clip_margin", "clip_margin:base")
    )
    retention = row["metrics"]["clip_retention"]
    assert retention["value"] == pytest.approx(own / base)
    assert retention["n"] == 210
    assert evidence.seeds_of("all_single") == ()


def test_paired_differences_use_shared_seeds_only() -> None:
    """With seed 2 of `searched` missing, both sides count the 280 pictures of seeds 0 and 1."""
    units = [unit for unit in make_units(rows=ROWS) if (unit.row, unit.seed) != ("searched", 2)]
    evidence = pool_units(units, rows=ROWS, seeds=SEEDS)
    found = evidence.difference("searched", "all_single", "ip")
    rates = {
        name: sum(u.measured["metrics"]["ip"]["value"] for u in units if u.row == name and u.seed < 2) / 2
        for name in ("searched", "all_single")
    }
    assert found is not None
    assert found.n == 280
    assert found.value == pytest.approx(rates["searched"] - rates["all_single"])
    assert found.low < found.value < found.high < 0
    assert evidence.difference("searched", "ties", "ip") is None
    assert evidence.difference("searched", "base", "no such metric") is None


def test_a_property_of_one_seed_only_is_not_claimed_of_the_pool() -> None:
    units = make_units(rows=ROWS)
    changed = [
        replace(unit, measured={**unit.measured, "adapter_hash": f"adapter-{unit.seed}", "scale": 1.0 + unit.seed})
        if unit.row == "searched"
        else unit
        for unit in units
    ]
    pooled = {row["name"]: row for row in overall_rows(pool_units(changed, rows=ROWS, seeds=SEEDS).summary)}
    assert (pooled["searched"]["adapter_hash"], pooled["searched"]["scale"]) == (None, None)
    assert (pooled["all_single"]["adapter_hash"], pooled["all_single"]["scale"]) == ("a" * 64, 1.0)


def test_refusals_of_a_pool() -> None:
    units = make_units(rows=ROWS)
    with pytest.raises(SafetyDPOError, match="found base of seed 0 twice: drop one"):
        pool_units([*units, units[0]], rows=ROWS, seeds=SEEDS)
    with pytest.raises(SafetyDPOError, match="and the seeds 0, 1, found searched of seed 2: leave it out"):
        pool_units([unit for unit in units if unit.row == "searched"], rows=ROWS, seeds=(0, 1))
    with pytest.raises(SafetyDPOError, match="expected units of the rows base, all_single and the seeds"):
        pool_units(units, rows=ROWS[:2], seeds=SEEDS)
    with pytest.raises(SafetyDPOError, match="expected the base among 3 measured units, found it in none"):
        pool_units([unit for unit in units if unit.row == "searched"], rows=ROWS, seeds=SEEDS)
    with pytest.raises(SafetyDPOError, match="expected the base among 0 measured units"):
        pool_units([], rows=ROWS, seeds=SEEDS)


def _version(document: dict[str, Any]) -> None:
    document["schema_version"] = 9


def _other_row(document: dict[str, Any]) -> None:
    document["unit"]["row"] = "ties"


def _lost_hit(document: dict[str, Any]) -> None:
    concept = next(iter(document["counts"]["rates"]["ip"]))
    document["counts"]["rates"]["ip"][concept][1] += 1


def _no_machine(document: dict[str, Any]) -> None:
    del document["machine"]


def _no_interval(document: dict[str, Any]) -> None:
    document["row"]["metrics"]["ip"]["low"] = 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_version, "expected a unit of schema_version 1 in unit.json, found 9: delete that file"),
        (_other_row, "expected the row 'ties' in unit.json, found 'searched'"),
        (_lost_hit, "expected counts that add up to ip of row 'searched' in unit.json, found"),
        (_no_machine, "expected the record of a measured unit in unit.json, found KeyError('machine')"),
        (_no_interval, "expected finite low <= value <= high for ip of row 'searched'"),
    ],
)
def test_a_damaged_record_is_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    document = json.loads(dump_unit(make_units(rows=ROWS)[2]))
    change(document)
    with pytest.raises(SafetyDPOError) as caught:
        parse_unit(json.dumps(document), source="unit.json")
    assert message in str(caught.value)


def test_text_that_is_no_record_is_refused() -> None:
    for text in ("", "{", "[]", "3"):
        with pytest.raises(SafetyDPOError, match=r"expected the record of a measured unit in x, found"):
            parse_unit(text, source="x")


def test_a_record_that_would_not_be_read_is_not_written() -> None:
    unit = make_units(rows=ROWS)[0]
    with pytest.raises(SafetyDPOError, match="expected the row 'sum'"):
        dump_unit(replace(unit, row="sum"))


def test_units_of_one_seed_rest_on_the_same_experts():
    units = [replace(unit, experts={"hate": "1"}) if unit.row != "base" else unit for unit in make_units()]
    rows = list(dict.fromkeys(unit.row for unit in units))
    assert pool_units(units, rows=rows, seeds=(0, 1, 2)).units
    assert parse_unit(dump_unit(units[-1]), source="here").experts == {"hate": "1"}
    mixed = [*units[:-1], replace(units[-1], experts={"hate": "2"})]
    with pytest.raises(SafetyDPOError, match=f"expected units of seed {units[-1].seed} that rest on the same experts"):
        pool_units(mixed, rows=rows, seeds=(0, 1, 2))
