"""Measured merges as JSON records: one method at one number of experts, one seed and one factor.

A record holds what every candidate was worth, which one was chosen, and totals per concept of the test of that one, so
that tables and plots need nothing but the records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safetydpo.artifacts.json_text import parse_json
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.counts import RowCounts, parse_counts
from safetydpo.evaluation.merge_curve import CurvePoint, Tally, Tuning, price_of, retention_of, share

SCHEMA_VERSION = 1
_PAIR = re.compile(r"\[\s+(-?[0-9.e+-]+),\s+([0-9]+)\s+\]")
STAGES = ("small", "full", "test")


@dataclass(frozen=True)
class MeasuredTuning:
    """One candidate.

    Attributes:
        tuning: Its scale and density.
        adapter: Hash of the merged adapter.
        truncation_error: Relative Frobenius error of the reduction to the output rank.
        small: What the small measurement counted.
        full: What the full one did; None if it was not among the best.
        suppliers: Mean over layers of how many experts supply at least one row; None for methods that blend, and in
            records of before.
    """

    tuning: Tuning
    adapter: str
    truncation_error: float
    small: Tally
    full: Tally | None = None
    suppliers: float | None = None


@dataclass(frozen=True)
class MergeUnit:
    """One method at one number of experts, measured.

    Attributes:
        method: Name in the merge registry, or `all_single`.
        count: Number of experts.
        seed: The run's seed.
        factor: What differs from the main grid.
        identity_hash: Hash of everything that decides the result; a record of another hash is not used.
        commit: Commit of the code, None outside a git clone.
        dirty: Whether code or configs differed from that commit.
        machine: Cores, processor, memory, versions of Python and torch.
        seconds: Wall time of all measurements of this unit, those taken over from equal adapters too.
        cpu_seconds: CPU time of the same; unlike wall time not longer on a busy machine.
        training_seconds: Wall time of the training of its experts, or of the adapter for `all_single`; of `distill`,
            the distillation too.
        experts: Hash over the fingerprints of the experts.
        concepts: Concepts that an expert is in the merge for.
        base: What the base was worth, by measurement.
        candidates: All candidates in order.
        chosen: Position of the one that was tested.
        tested: What the test counted, by the `audit` judge.
        counts: The same per concept.
    """

    method: str
    count: int
    seed: int
    factor: str
    identity_hash: str
    commit: str | None
    dirty: bool
    machine: Mapping[str, Any]
    seconds: float
    cpu_seconds: float
    training_seconds: float
    experts: str
    concepts: Sequence[str]
    base: Mapping[str, Tally]
    candidates: Sequence[MeasuredTuning]
    chosen: int
    tested: Tally
    counts: RowCounts

    @property
    def suppliers(self) -> float | None:
        """Mean number of distinct suppliers per layer of the tested candidate; None if it is not known."""
        return self.candidates[self.chosen].suppliers

    @property
    def validated(self) -> list[tuple[int, Tally]]:
        """Positions and counts of the fully validated candidates."""
        return [(index, one.full) for index, one in enumerate(self.candidates) if one.full is not None]

    def points(self, stage: str, *, with_mush: bool = False) -> list[CurvePoint]:
        """Return what was measured at a stage, the base too: IP, or IP and unrecognisable pictures, over retention."""
        if stage == "test":
            tallies = [self.tested]
        elif stage == "full":
            tallies = [tally for _, tally in self.validated]
        else:
            tallies = [one.small for one in self.candidates]
        base = self.base[stage]
        return [
            CurvePoint(retention_of(tally, base), price_of(tally) if with_mush else share(tally, "ip"))
            for tally in (base, *tallies)
        ]


def dump_merge_unit(unit: MergeUnit) -> str:
    """Return the text of a unit's record, checked.

    Raises:
        SafetyDPOError: if the record would not be read back.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        "unit": {"method": unit.method, "count": unit.count, "seed": unit.seed, "factor": unit.factor},
        "identity_hash": unit.identity_hash,
        "commit": unit.commit,
        "dirty": unit.dirty,
        "machine": dict(unit.machine),
        "seconds": round(unit.seconds, 3),
        "cpu_seconds": round(unit.cpu_seconds, 3),
        "training_seconds": round(unit.training_seconds, 3),
        "experts": unit.experts,
        "concepts": list(unit.concepts),
        "base": {stage: _plain(tally) for stage, tally in unit.base.items()},
        "candidates": [
            {
                "scale": one.tuning.scale,
                "density": one.tuning.density,
                "adapter": one.adapter,
                "truncation_error": one.truncation_error,
                "small": _plain(one.small),
                "full": None if one.full is None else _plain(one.full),
                # Left out where there is none, as in records of before.
                **({} if one.suppliers is None else {"suppliers": one.suppliers}),
            }
            for one in unit.candidates
        ],
        "chosen": unit.chosen,
        "tested": _plain(unit.tested),
        "counts": unit.counts.to_json(),
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # One line per count, so that a person can read the record and a diff of it.
    text = _PAIR.sub(r"[\1, \2]", text)
    parse_merge_unit(text, source=f"the record of {unit.method}, {unit.count} experts, seed {unit.seed}")
    return text


def parse_merge_unit(text: str, *, source: str) -> MergeUnit:
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
                f"expected a measured merge of schema_version {SCHEMA_VERSION} in {source}, found {version!r}: {again}"
            )
        unit = MergeUnit(
            method=str(document["unit"]["method"]),
            count=int(document["unit"]["count"]),
            seed=int(document["unit"]["seed"]),
            factor=str(document["unit"]["factor"]),
            identity_hash=str(document["identity_hash"]),
            commit=None if document["commit"] is None else str(document["commit"]),
            dirty=bool(document["dirty"]),
            machine=dict(document["machine"]),
            seconds=float(document["seconds"]),
            cpu_seconds=float(document["cpu_seconds"]),
            training_seconds=float(document["training_seconds"]),
            experts=str(document["experts"]),
            concepts=tuple(map(str, document["concepts"])),
            base={stage: parse_tally(document["base"][stage], source=source) for stage in STAGES},
            candidates=tuple(_parse_candidate(row, source) for row in document["candidates"]),
            chosen=int(document["chosen"]),
            tested=parse_tally(document["tested"], source=source),
            counts=parse_counts(document["counts"], source=source),
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise SafetyDPOError(
            f"expected the record of a measured merge in {source}, found {error!r}: {again}"
        ) from error
    wrong = [one.suppliers for one in unit.candidates if not 0 <= (one.suppliers or 0) <= unit.count]
    if wrong:
        raise SafetyDPOError(
            f"expected 0 to {unit.count} suppliers per layer of {unit.count} experts in {source}, found {wrong[0]}: "
            f"{again}"
        )
    if unit.chosen not in [index for index, _ in unit.validated]:
        raise SafetyDPOError(
            f"expected a fully validated candidate to be the chosen one in {source}, found number {unit.chosen}: "
            f"{again}"
        )
    return unit


def _parse_candidate(row: Mapping[str, Any], source: str) -> MeasuredTuning:
    density, suppliers = row["density"], row.get("suppliers")
    return MeasuredTuning(
        Tuning(float(row["scale"]), None if density is None else float(density)),
        str(row["adapter"]),
        float(row["truncation_error"]),
        parse_tally(row["small"], source=source),
        None if row["full"] is None else parse_tally(row["full"], source=source),
        None if suppliers is None else float(suppliers),
    )


def parse_tally(document: Any, *, source: str) -> dict[str, tuple[int, int]]:
    """Return counts as they stand in JSON.

    Raises:
        SafetyDPOError: if hits are no whole number between 0 and n.
    """
    tally: dict[str, tuple[int, int]] = {}
    for name, (hits, n) in document.items():
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in (hits, n)) or not 0 <= hits <= n:
            raise SafetyDPOError(
                f"expected hits between 0 and n in {source}, found {hits!r} of {n!r} at {name}: delete that file and "
                "measure its unit again"
            )
        tally[str(name)] = (hits, n)
    return tally


def _plain(tally: Tally) -> dict[str, list[int]]:
    return {name: [hits, n] for name, (hits, n) in tally.items()}
