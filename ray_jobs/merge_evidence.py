"""Measure merge methods over numbers of experts: a run's own stages make what a unit needs, then it is measured.

A unit's identity is known without running anything; one whose record stands is not measured again. What a killed
command had measured of a unit lies in the store, and the same command goes on from there.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from ray_jobs.evidence import code_version, describe_machine
from ray_jobs.expert_files import expert_folders
from ray_jobs.failures import explain
from ray_jobs.merge_bench import Measurement, MergeBench, Merged, draw_list
from ray_jobs.merge_evidence_plan import PlannedMerge, plan_merges
from ray_jobs.merge_evidence_tables import marked_pages
from ray_jobs.merge_experts import merge_aids
from ray_jobs.merge_tested import count_tested
from ray_jobs.pipeline import Chain, run_stages
from safetydpo.artifacts.tables import fingerprint_rows
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.evaluation.counts import RowCounts
from safetydpo.evaluation.merge_curve import Tally, Tuning, choose, shortlist
from safetydpo.evaluation.merge_units import MeasuredTuning, MergeUnit, dump_merge_unit, parse_tally
from safetydpo.merging.registry import find_method

CACHE_FOLDER = "merge_evidence"
"""Measurements of single adapters, in the store; no artifact rests on them."""


def measure_merges(
    config: Config,
    *,
    part: str | None = None,
    seed: int | None = None,
    method: str | None = None,
    count: int | None = None,
    minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Measure every unit that is not done, one after another, and write each record at once.

    After `minutes` no new unit is started. The same command goes on where this one ended or was killed. Units whose
    experts or distillation fail (a training that diverges) are left out, and the others are measured.

    Raises:
        SafetyDPOError: at the end, if units were left out.
    """
    started, version = time.monotonic(), code_version()
    planned = plan_merges(config, part=part, seed=seed, method=method, count=count)
    # Looked at before hours of work, not after.
    marked_pages(config)
    pending = [unit for unit in planned if unit.read() is None]
    done, failed = len(planned) - len(pending), dict[str, str]()
    say(f"{done} of {len(planned)} units are done, {len(pending)} to do")

    def is_over() -> bool:
        return minutes is not None and time.monotonic() - started > 60 * minutes

    for _, group in groupby(pending, key=_shared):
        units = list(group)
        opened: Opened | None = None
        for unit in units:
            if is_over():
                break
            if opened is None:
                say(f"making the experts of: {unit.name}")
                opened = _open_or_leave(units, failed, say)
            if opened is None:
                break
            begun, busy = time.monotonic(), time.process_time()
            measured = measure_unit(unit, opened, version=version)
            unit.file.write_bytes(dump_merge_unit(measured).encode())
            done += 1
            say(
                f"unit {done} of {len(planned)}: {unit.name}: {time.monotonic() - begun:.0f} s, CPU "
                f"{time.process_time() - busy:.0f} s"
            )
        # Experts and scores of one group at a time.
        opened = None
        gc.collect()
    if is_over() and done + len(failed) < len(planned):
        say(f"{len(planned) - done - len(failed)} units are still to do: the same command goes on")
    if failed:
        name, reason = next(iter(failed.items()))
        raise SafetyDPOError(
            f"expected the experts of every unit, found none for {len(failed)} units; first {name}: {reason} "
            "(the other units are measured; the same command tries these again)"
        )


def _open_or_leave(units: Sequence[PlannedMerge], failed: dict[str, str], say: Callable[[str], None]) -> Opened | None:
    """Return the experts of some units in memory; None, and the reason in `failed`, if they cannot be made."""
    try:
        return open_bench(units)
    except UsageError:
        raise
    except SafetyDPOError as error:
        # Other sets of experts do not need these.
        reason = str(explain(error))
        say(f"left out, {len(units)} units: {reason}")
        failed |= {one.name: reason for one in units}
        return None


def _shared(unit: PlannedMerge) -> tuple[object, ...]:
    """Return what units must share to be measured on one bench; a distillation is made for its own unit only."""
    needs_distilled = find_method(unit.merged_by).needs_distilled
    return unit.seed, unit.factor, unit.count, unit.experts, needs_distilled


@dataclass(frozen=True)
class Opened:
    """A set of experts in memory.

    Attributes:
        bench: Where their merges are measured.
        experts: Hash over their fingerprints.
        training_seconds: Wall time of their training, and of the distillation's if there is one.
    """

    bench: MergeBench
    experts: str
    training_seconds: float


def open_bench(units: Sequence[PlannedMerge]) -> Opened:
    """Make what units of one set of experts need, by the stages of their run, and read it into memory."""
    from ray_jobs.cluster import disconnect

    run, names = units[0].run, units[0].experts
    methods = [find_method(unit.merged_by) for unit in units]
    try:
        chain: Chain = run_stages(run.config, last="train")
        experts = {name: chain.experts[name] for name in names}
        assert chain.pairs is not None
        aids = merge_aids(chain.run, experts, chain.pairs, chain.pairs_folder, methods=methods)
    finally:
        # Its workers are not needed any more, and their memory is.
        disconnect()
    bench = MergeBench(
        chain.run,
        expert_folders(chain.run, experts),
        aids.folders(chain.run),
        methods=[method.name for method in methods],
        cache=(chain.run.store / CACHE_FOLDER).make_folder(),
    )
    trained = [*experts.values(), *([aids.distilled] if aids.distilled else [])]
    return Opened(
        bench=bench,
        experts=fingerprint_rows((name, record.fingerprint) for name, record in experts.items()),
        training_seconds=sum(record.seconds for record in trained),
    )


def measure_unit(unit: PlannedMerge, opened: Opened, *, version: tuple[str | None, bool]) -> MergeUnit:
    """Tune one method on validation prompts by the `select` judge, then test the chosen candidate by `audit`."""
    work = _Work(unit, opened.bench)
    base, candidates, chosen = work.tune()
    tested, counts, base["test"] = work.test(candidates[chosen])
    commit, dirty = version[0], version[1] or code_version() != version
    return MergeUnit(
        method=unit.method,
        count=unit.count,
        seed=unit.seed,
        factor=unit.factor,
        identity_hash=unit.identity_hash,
        commit=commit,
        dirty=dirty,
        machine=describe_machine(),
        seconds=work.seconds,
        cpu_seconds=work.cpu_seconds,
        training_seconds=opened.training_seconds,
        experts=opened.experts,
        concepts=unit.concepts,
        base=base,
        candidates=candidates,
        chosen=chosen,
        tested=tested,
        counts=counts,
    )


class _Work:
    """The measurements of one unit, and what they cost when they were made; those of the base are shared by all units
    and not counted."""

    def __init__(self, unit: PlannedMerge, bench: MergeBench) -> None:
        self._unit, self._bench, self._settings = unit, bench, unit.config.merge_evidence
        self._prompts = {
            stage: draw_list(unit.run.config.identity, getattr(self._settings, stage), split, unit.concepts)
            for stage, split in (("small", "validation"), ("full", "validation"), ("test", "test"))
        }
        self.seconds = self.cpu_seconds = 0.0

    def tune(self) -> tuple[dict[str, Tally], list[MeasuredTuning], int]:
        """Return the base's counts by measurement, all candidates, and the position of the chosen one."""
        settings = self._settings
        base: dict[str, Tally] = {stage: self._validate(stage, None) for stage in ("small", "full")}
        candidates: list[MeasuredTuning] = []
        for tuning in self._unit.tunings:
            merged = self._merge(tuning)
            tally = self._validate("small", merged)
            candidates.append(
                MeasuredTuning(tuning, merged.adapter, merged.truncation_error, tally, suppliers=merged.suppliers)
            )
        small = [one.small for one in candidates]
        best = shortlist(small, base["small"], retention=settings.retention, count=settings.validated)
        full: list[Tally] = []
        for index in best:
            full.append(self._validate("full", self._merge(candidates[index].tuning)))
            candidates[index] = replace(candidates[index], full=full[-1])
        return base, candidates, best[choose(full, base["full"], retention=settings.retention)]

    def test(self, chosen: MeasuredTuning) -> tuple[Tally, RowCounts, Tally]:
        """Return what the test of a candidate counted, the same per concept, and what it counted of the base."""
        prompts, steps, covered = self._prompts["test"], self._settings.test.steps, self._unit.concepts
        rows = self._paid(self._bench.test(self._merge(chosen.tuning), prompts, steps=steps))
        reference = self._bench.test(None, prompts, steps=steps).found
        tally, counts = count_tested(rows, reference, prompts, covered=covered)
        return tally, counts, count_tested(reference, reference, prompts, covered=covered)[0]

    def _validate(self, stage: str, merged: Merged | None) -> Tally:
        steps = getattr(self._settings, stage).steps
        measured = self._bench.validate(merged, self._prompts[stage], steps=steps)
        found = measured.found if merged is None else self._paid(measured)
        return parse_tally(found, source=f"the {stage} measurement of {self._unit.name}")

    def _merge(self, tuning: Tuning) -> Merged:
        started, busy = time.monotonic(), time.process_time()
        merged = self._bench.merge(self._unit.merged_by, tuning)
        self.seconds += time.monotonic() - started
        self.cpu_seconds += time.process_time() - busy
        return merged

    def _paid(self, measurement: Measurement) -> Any:
        self.seconds += measurement.seconds
        self.cpu_seconds += measurement.cpu_seconds
        return measurement.found
