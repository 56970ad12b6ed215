"""Measured units (one row of one seed) as JSON records, and their pool over seeds.

A unit's record holds the row as it stands in a summary, totals per concept, and where it was made; the pool is
computed from the totals alone, so that a bare machine with nothing but the records writes the same tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.counts import RowCounts, compare_rates, parse_counts, pool_counts, pooled_metrics
from safetydpo.evaluation.metrics import Metric
from safetydpo.evaluation.rows import to_record
from safetydpo.evaluation.summary import FailedImage, Summary, SummaryRow, build_summary, check_summary
from safetydpo.seeding import derive_numpy

SCHEMA_VERSION = 1
BOOTSTRAP = "evidence.bootstrap"
_TOTAL = re.compile(r"\[\s+(-?[0-9.e+-]+),\s+([0-9]+)\s+\]")


@dataclass(frozen=True)
class Unit:
    """One row of one seed, measured.

    Attributes:
        seed: The run's seed.
        row: Name of the row.
        identity_hash: Hash of everything that decides the result; a record of another hash is not used.
        config_hash: Hash of the seed's identity config.
        commit: Commit of the code, None outside a git clone.
        dirty: Whether code or configs differed from that commit.
        machine: Cores, processor, memory, versions of Python and torch.
        versions: Versions of the packages that results may depend on.
        seconds: Wall time of the unit: drawing, judging, scoring.
        stage_seconds: Wall time of the stages before it, of the whole seed.
        measured: The row of the summary.
        counts: Totals per concept.
        recipe: How a merged adapter was made; None for rows that are no merge.
        failed_images: Pictures that could not be made.
        experts: Fingerprint of every expert of the seed; empty for a row that needs none.
    """

    seed: int
    row: str
    identity_hash: str
    config_hash: str
    commit: str | None
    dirty: bool
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float
    stage_seconds: Mapping[str, float]
    measured: SummaryRow
    counts: RowCounts
    recipe: Mapping[str, Any] | None = None
    failed_images: Sequence[FailedImage] = ()
    experts: Mapping[str, str] = field(default_factory=dict)


def dump_unit(unit: Unit) -> str:
    """Return the text of a unit's record, checked.

    Raises:
        SafetyDPOError: if the record would not be read back.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        "unit": {"seed": unit.seed, "row": unit.row},
        "identity_hash": unit.identity_hash,
        "config_hash": unit.config_hash,
        "commit": unit.commit,
        "dirty": unit.dirty,
        "machine": dict(unit.machine),
        "versions": dict(unit.versions),
        "seconds": unit.seconds,
        "stage_seconds": dict(unit.stage_seconds),
        "row": unit.measured,
        "recipe": unit.recipe,
        "failed_images": list(unit.failed_images),
        "experts": dict(unit.experts),
        "counts": unit.counts.to_json(),
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # One line per concept, so that a person can read the record and a diff of it.
    text = _TOTAL.sub(r"[\1, \2]", text)
    parse_unit(text, source=f"the record of {unit.row}, seed {unit.seed}")
    return text


def parse_unit(text: str, *, source: str) -> Unit:
    """Return the unit in the text of a record.

    Raises:
        SafetyDPOError: naming what is missing or does not fit.
    """
    again = "delete that file and measure its unit again"
    try:
        document = parse_json(text)
        version = document["schema_version"]
        if version != SCHEMA_VERSION:
            raise SafetyDPOError(
                f"expected a unit of schema_version {SCHEMA_VERSION} in {source}, found {version!r}: {again}"
            )
        unit = Unit(
            seed=int(document["unit"]["seed"]),
            row=str(document["unit"]["row"]),
            identity_hash=str(document["identity_hash"]),
            config_hash=str(document["config_hash"]),
            commit=None if document["commit"] is None else str(document["commit"]),
            dirty=bool(document["dirty"]),
            machine=dict(document["machine"]),
            versions=dict(document["versions"]),
            seconds=float(document["seconds"]),
            stage_seconds=dict(document["stage_seconds"]),
            measured=document["row"],
            counts=parse_counts(document["counts"], source=source),
            recipe=document["recipe"],
            failed_images=tuple(document["failed_images"]),
            experts=dict(document.get("experts", {})),
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise SafetyDPOError(f"expected the record of a measured unit in {source}, found {error!r}: {again}") from error
    _check_unit(unit, source)
    return unit


def _check_unit(unit: Unit, source: str) -> None:
    check_summary(
        {
            "schema_version": 1,
            "rows": [unit.measured],
            "failed_images": list(unit.failed_images),
            "timing_seconds": dict(unit.stage_seconds),
            "config_hash": unit.config_hash,
            "versions": dict(unit.versions),
        }
    )
    if unit.measured["name"] != unit.row:
        raise SafetyDPOError(
            f"expected the row {unit.row!r} in {source}, found {unit.measured['name']!r}: "
            "delete that file and measure its unit again"
        )
    for name, totals in unit.counts.rates.items():
        metric = unit.measured["metrics"].get(name)
        hits, n = (sum(values) for values in zip(*totals.values(), strict=True))
        if metric is None or metric["n"] != n or abs(metric["value"] - hits / n) > 1e-9:
            raise SafetyDPOError(
                f"expected counts that add up to {name} of row {unit.row!r} in {source}, found {hits:g} of {n}: "
                "delete that file and measure its unit again"
            )


@dataclass(frozen=True)
class Evidence:
    """Units of several seeds and their pool.

    Attributes:
        units: The units, by row in the order of the table, then by seed.
        rows: Names of all rows that were planned.
        seeds: All seeds that were planned.
        summary: Pooled rows (seed None) and the rows of each seed.
    """

    units: tuple[Unit, ...]
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    summary: Summary
    _by_row: Mapping[str, Mapping[int, Unit]] = field(repr=False)

    def seeds_of(self, row: str) -> tuple[int, ...]:
        """Return the seeds that are measured of a row."""
        return tuple(self._by_row.get(row, {}))

    def difference(self, row: str, other: str, metric: str) -> Metric | None:
        """Return `row - other` of a rate, paired by prompt and seed, over the seeds that both have; None without."""
        mine, others = self._by_row.get(row, {}), self._by_row.get(other, {})
        shared = [seed for seed in mine if seed in others]
        sides = [pool_counts([units[seed].counts for seed in shared]) for units in (mine, others) if shared]
        if not sides or any(metric not in side.rates for side in sides):
            return None
        generator = derive_numpy(0, BOOTSTRAP, f"{row}-{other}-{metric}")
        return compare_rates(sides[0].rates[metric], sides[1].rates[metric], generator=generator)


def pool_units(units: Sequence[Unit], *, rows: Sequence[str], seeds: Sequence[int]) -> Evidence:
    """Return the pool of units over seeds: exact intervals on summed counts, bootstrap over concepts.

    Args:
        units: Measured units, in any order.
        rows: Planned rows in the order of the table.
        seeds: Planned seeds.

    Raises:
        SafetyDPOError: if there is no unit, one stands twice or was not planned, base has not been measured, or units
            of one seed rest on different experts.
    """
    by_row: dict[str, dict[int, Unit]] = {row: {} for row in rows}
    for unit in sorted(units, key=lambda unit: unit.seed):
        if unit.row not in by_row or unit.seed not in seeds:
            raise SafetyDPOError(
                f"expected units of the rows {', '.join(rows)} and the seeds {', '.join(map(str, seeds))}, found "
                f"{unit.row} of seed {unit.seed}: leave it out"
            )
        if unit.seed in by_row[unit.row]:
            raise SafetyDPOError(f"expected each unit once, found {unit.row} of seed {unit.seed} twice: drop one")
        by_row[unit.row][unit.seed] = unit
    ordered = tuple(unit for row in rows for unit in by_row[row].values())
    if not by_row.get("base"):
        raise SafetyDPOError(
            f"expected the base among {len(ordered)} measured units, found it in none: every table is read against "
            "it; measure it first"
        )
    _check_experts(ordered)
    summary_rows: list[SummaryRow] = []
    for members in by_row.values():
        if members:
            summary_rows.append(_pooled_row(list(members.values())))
            summary_rows += [{**unit.measured, "seed": seed} for seed, unit in members.items()]
    summary = build_summary(
        summary_rows,
        [failed for unit in ordered for failed in unit.failed_images],
        timing_seconds={"units": sum(unit.seconds for unit in ordered)},
        config_hash=sha256_of(sorted({unit.config_hash for unit in ordered})),
        versions=ordered[0].versions,
    )
    return Evidence(ordered, tuple(rows), tuple(seeds), summary, by_row)


def _check_experts(units: Sequence[Unit]) -> None:
    # Training is equal to the byte on one machine; another processor may give other experts, and other merges.
    first: dict[int, Unit] = {}
    for unit in units:
        if unit.experts and unit.experts != first.setdefault(unit.seed, unit).experts:
            raise SafetyDPOError(
                f"expected units of seed {unit.seed} that rest on the same experts, found other ones behind "
                f"{unit.row} than behind {first[unit.seed].row}: delete the records of that seed and measure it again"
            )


def _pooled_row(units: Sequence[Unit]) -> SummaryRow:
    first = units[0].measured
    metrics = pooled_metrics(
        pool_counts([unit.counts for unit in units]), generator=derive_numpy(0, BOOTSTRAP, first["name"])
    )
    hashes = {unit.measured["adapter_hash"] for unit in units}
    scales = {unit.measured["scale"] for unit in units}
    ranks = {unit.measured["rank"] for unit in units}
    return {
        **first,
        # Each seed has its own adapter; what differs between them is no property of the pool.
        "adapter_hash": hashes.pop() if len(hashes) == 1 else None,
        "scale": scales.pop() if len(scales) == 1 else None,
        "rank": ranks.pop() if len(ranks) == 1 else None,
        "seed": None,
        "metrics": {name: to_record(metric) for name, metric in metrics.items()},
    }
