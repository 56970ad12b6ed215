"""What a search chose of its trials, and what whoever uses it must be warned of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_jobs.trial_log import TrialLog, measured_merges
from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.tables import fingerprint_rows
from safetydpo.config.search import SearchConfig
from safetydpo.errors import SafetyDPOError
from safetydpo.search.objective import best_index, judge_metrics
from safetydpo.search.plans import OK, STOPPED

MAX_FAILED_TRIALS = 0.25
"""Share of trials above which whoever uses the search is warned: its sampler has learnt nothing from them."""
BASE_IS_BETTER, FAILURES = "base_is_better", "failures"
"""Of a record's details, only where there is something to be warned of."""


def choose(log: TrialLog, base: Mapping[str, float], search: SearchConfig) -> Mapping[str, Any]:
    """Return fingerprint, counts and details of a finished search; the base, if it was a trial, is never chosen.

    Raises:
        SafetyDPOError: if no merge was measured in full.
    """
    rows = log.rows()
    stopped = [row for row in rows if row["status"] == STOPPED]
    failed = failed_trials(log)
    merges = measured_merges(rows)
    objectives = [judge_metrics(parse_json(row["metrics"]), base=base, search=search) for row in merges]
    best = best_index(objectives)
    if best is None:
        cause = f", the first failure: {failed[0]['error']}" if failed else ""
        raise SafetyDPOError(
            f"expected at least one measured merge of {len(rows)} trials, found none and {len(failed)} failed{cause}; "
            "mend the cause and run the same command again, which tries them again"
        )
    return {
        "fingerprint": fingerprint_rows((str(row["trial"]), f"{row['candidate']}{row['objective']!r}") for row in rows),
        "counts": {"trials": len(rows), "failed": len(failed), **({"stopped": len(stopped)} if stopped else {})},
        "details": {
            "trial": merges[best]["trial"],
            "candidate": merges[best]["candidate"],
            "metrics": parse_json(merges[best]["metrics"]),
            "base": dict(base),
            "feasible": objectives[best].feasible,
        },
    }


def failed_trials(log: TrialLog) -> list[dict[str, Any]]:
    """Return the rows of trials that failed, in order."""
    return [row for row in log.rows() if row["status"] not in (OK, STOPPED)]


def warnings_of(details: Mapping[str, Any], log: TrialLog, search: SearchConfig) -> dict[str, Any]:
    """Return what a record's details say beside the choice: many failures, or that the base is better; often {}."""
    found: dict[str, Any] = {}
    failed, rows = failed_trials(log), log.rows()
    if len(failed) > MAX_FAILED_TRIALS * len(rows):
        found[FAILURES] = {"failed": len(failed), "trials": len(rows), "first_error": failed[0]["error"]}
    if not beats_base(details, search):
        found[BASE_IS_BETTER] = True
    return found


def beats_base(details: Mapping[str, Any], search: SearchConfig) -> bool:
    """Return whether the chosen merge meets the floors and has a lower objective than the base without an adapter.

    `details` are those of a search's record; of a finalist the numbers that it was chosen by count.
    """
    told_of = details.get("fresh", details)
    own = judge_metrics(told_of["metrics"], base=told_of["base"], search=search)
    alone = judge_metrics(told_of["base"], base=told_of["base"], search=search)
    # A base with rates that a log of before does not have says nothing.
    return not alone.valid or (own.feasible and own.value < alone.value)
