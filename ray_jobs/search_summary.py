"""What a search says of itself: its progress for those who watch, its ladder for the record, its choice in one line."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from ray_jobs.merge_searcher import budget_of
from ray_jobs.run import Run
from ray_jobs.search_choice import FAILURES, beats_base
from ray_jobs.search_files import PROGRESS_FILE
from ray_jobs.trial_log import MeasurementLog, TrialLog
from safetydpo.artifacts.layout import RECORD_FILE
from safetydpo.artifacts.storage import Location
from safetydpo.config.search import SearchConfig
from safetydpo.search.ladder import rank_correlation
from safetydpo.search.objective import IP, NEIGHBOUR, NEUTRAL, UNRECOGNISABLE
from safetydpo.search.plans import OK
from safetydpo.search.space import Candidate


def write_progress(run: Run, folder: Location) -> None:
    """Write what somebody who watches a search must know beside its logs."""
    search, budget = run.config.identity.search, budget_of(run.config.execution)
    content = {
        "run_dir": run.run_dir.path,
        "trials": search.trials,
        "rungs": [rung.kind for rung in search.ladder],
        "price_per_second": budget.price_per_second,
        "time_budget_s": budget.seconds,
        "cost_budget": budget.cost,
        "started_at": time.time(),
    }
    (folder / PROGRESS_FILE).write_bytes(json.dumps(content, indent=2).encode() + b"\n")


def describe_ladder(run: Run, log: TrialLog, measurements: MeasurementLog, *, num_prompts: int) -> dict[str, Any]:
    """Return how many candidates each rung measured, how well it ranks those measured further, and pictures drawn.

    `full` compares a rung with the full evaluation, `next` with the rung after it. Candidates that a rung stopped are
    not among those, so that a correlation is of its favourites, but for the trials of `calibrate`.
    """
    ladder = run.config.identity.search.ladder
    rows = [row for row in log.rows() if not Candidate.from_json(row["candidate"]).is_base]
    full = {row["candidate_hash"]: float(row["objective"]) for row in rows if row["status"] == OK}
    values: list[dict[str, float]] = []
    for rung in range(len(ladder)):
        measured = {row["candidate_hash"]: measurements.find(row["candidate_hash"], rung) for row in rows}
        values.append({key: row["value"] for key, row in measured.items() if row is not None})
    values.append(full)
    rungs = [
        {
            "kind": ladder[rung].kind,
            "measured": len(values[rung]),
            "went_on": len(values[rung].keys() & values[rung + 1].keys()),
            "full": _correlation(values[rung], full),
            "next": _correlation(values[rung], values[rung + 1]),
        }
        for rung in range(len(ladder))
    ]
    drawn = sum(row["pictures"] for row in measurements.rows() if row["rung"] <= len(ladder) and row["candidate"])
    return {
        "rungs": rungs,
        "pictures": drawn,
        "pictures_of_full_evaluation": len({row["candidate_hash"] for row in rows}) * num_prompts,
    }


def _correlation(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, Any]:
    both = sorted(one.keys() & other.keys())
    found = rank_correlation([one[key] for key in both], [other[key] for key in both])
    return {"spearman": found.spearman, "kendall": found.kendall, "n": found.n}


def describe_choice(details: Mapping[str, Any], search: SearchConfig) -> str:
    """Return which candidate a search chose, in one line; if none met the floors or beat the base, which came nearest.

    `details` are those of a search's record.
    """
    candidate = Candidate.from_json(str(details["candidate"]))
    # Of a finalist the numbers that it was chosen by.
    told_of = details.get("fresh", details)
    metrics, base = told_of["metrics"], told_of["base"]
    told = f"trial {details['trial']}, {candidate.method} x {candidate.global_scale:.2f}"
    kept = ", ".join(
        f"{name} {metrics[key] / base[key]:.2f} of the base's (floor {floor:g})"
        for name, key, floor in (
            ("neutral rate", NEUTRAL, search.neutral_floor),
            ("neighbour retention", NEIGHBOUR, search.neighbour_floor),
        )
    )
    numbers = f"IP {metrics[IP]:.2f}, {kept}"
    if not details["feasible"]:
        return f"no candidate met the floor; nearest: {told}: {numbers}"
    if not beats_base(details, search):
        return f"no candidate that met the floors is better than the base; nearest: {told}: {numbers}"
    return f"chosen {told}: {numbers}"


def describe_warnings(details: Mapping[str, Any], search: SearchConfig, *, folder: str = "its folder") -> list[str]:
    """Return what whoever uses the chosen adapter must know, a line each; [] where there is nothing to say.

    `details` are those of a search's record, `folder` where that record stands.
    """
    found = []
    failures = details.get(FAILURES)
    if failures:
        found.append(
            f"{failures['failed']} of {failures['trials']} trials failed, the first one for "
            f"{failures['first_error']!r}: the choice is of the others; to try them again, mend the cause, delete "
            f"{RECORD_FILE} in {folder} and run the same command"
        )
    if not beats_base(details, search):
        base = details.get("fresh", details)["base"]
        price = base[IP] + search.unrecognisable_weight * base.get(UNRECOGNISABLE, 0.0)
        found.append(
            f"by the search's own numbers the base without an adapter is the better choice (IP {base[IP]:.2f}, "
            f"objective {price:.2f}): the exported adapter is the nearest merge, not an improvement; train other "
            "experts, add methods or scales, or lower the floors"
        )
    return found
