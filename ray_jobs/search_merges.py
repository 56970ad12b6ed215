"""Stage 4: Ray Tune searches merge method, scale and coefficients; safety first, subject to quality floors.

In generations, which are seeded and told in trial order, the search is equal on any number of workers; it resumes from
its Parquet log, and nothing of Ray's or Optuna's own state is ever read back.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from ray_jobs.cluster import connect
from ray_jobs.expert_files import MergeAids, expert_folders
from ray_jobs.finalists import choose_finalist
from ray_jobs.generate_pairs import SELECT_JUDGE
from ray_jobs.merge_evaluator import MergeEvaluator
from ray_jobs.merge_experts import merge_aids, merged_artifact
from ray_jobs.merge_searcher import BudgetError, run_trials, values_of
from ray_jobs.prompt_tables import chosen_pairs, split_prompts, spread_prompts, what_to_add
from ray_jobs.resources import task_options
from ray_jobs.run import Run
from ray_jobs.search_checks import NOTHING_NAMED, check_benchmarks, named_benchmarks
from ray_jobs.search_choice import choose, warnings_of
from ray_jobs.search_files import BASE_FILE, BASE_RUNGS_FILE
from ray_jobs.search_judges import JUDGES_SETTING, asks_demo_judge, fingerprint_search_judges, model_places
from ray_jobs.search_space import search_space, shared_weights
from ray_jobs.search_summary import describe_choice, describe_ladder, describe_warnings, write_progress
from ray_jobs.trial_log import BASE, MeasurementLog, TrialLog, measured_merges
from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.records import ArtifactKey, Record
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.pairs import GENERATE
from safetydpo.config.rungs import HeldOutRung
from safetydpo.config.search import SearchConfig
from safetydpo.errors import UsageError
from safetydpo.prompts.sets import Prompt
from safetydpo.search.guard import refuse_test_prompts
from safetydpo.search.objective import IP, judge_metrics
from safetydpo.search.plans import OK, AsyncPlan, GenerationPlan, Plan
from safetydpo.search.recognition import LEAST_SIMILARITY
from safetydpo.search.replay import LoggedTrial, ReplayStudy
from safetydpo.search.space import Candidate, SearchSpace, known_candidates
from safetydpo.seeding import derive_seed

logger = logging.getLogger(__name__)
RECIPE_VERSION = 4
PROMPT_SETS = ("unsafe", "neutral", "neighbour")


@dataclass(frozen=True)
class Searched:
    """What one search is about: experts, what their merges need, prompts, space, and the pairs for its rungs."""

    experts: Mapping[str, Record]
    aids: MergeAids
    prompts: Sequence[Prompt]
    space: SearchSpace
    pairs: Record
    pairs_folder: Location


def search_merges(
    run: Run, experts: Mapping[str, Record], pairs: Record, pairs_folder: Location
) -> tuple[Record, Record]:
    """Make or find the search and the adapter it chose; return (record of the search, record of the adapter).

    Raises:
        BudgetError: if a budget ended the search before its last trial.
    """
    from safetydpo.merging.registry import find_method

    members = {name: record for name, record in experts.items() if name != ALL_SINGLE}
    prompts = validation_prompts(run)
    identity = run.config.identity
    methods = [find_method(name) for name in identity.search.methods]
    aids = merge_aids(run, experts, pairs, pairs_folder, methods=methods)
    searched = Searched(members, aids, prompts, search_space(run, members), pairs, pairs_folder)
    key = search_key(run, searched)
    # Looked at each time, also where the search is closed: its prompts must not be in a benchmark.
    guard = check_benchmarks(named_benchmarks(run.config), [prompt.text for prompt in prompts])
    record = run.build("search", key, lambda folder: _search(run, folder, searched, guard))
    if guard != NOTHING_NAMED:
        # A closed search may have been compared with others: what is told is what was looked at now.
        record = replace(record, details={**record.details, "benchmarks": guard})
    candidate = Candidate.from_json(str(record.details["candidate"]))
    return record, _searched_adapter(run, candidate, members, aids)


def search_key(run: Run, searched: Searched) -> ArtifactKey:
    """Return the key of a search."""
    from ray_jobs.merge_settings import searched_settings

    identity = run.config.identity
    return ArtifactKey(
        stage="search",
        name=run.config.name,
        identity={
            "seed": identity.seed,
            "base": identity.base.model_dump(mode="json"),
            "sampler": identity.sampler.model_dump(mode="json"),
            # The CLIP model is among the inputs, wherever it lies.
            "search": identity.search.model_dump(mode="json", exclude={"clip"}),
            "output_rank": identity.merge.output_rank,
            **({"judge": SELECT_JUDGE} if asks_demo_judge(identity) else {}),
            **searched_settings(identity),
        },
        inputs={
            "experts": fingerprint_rows((name, record.fingerprint) for name, record in searched.experts.items()),
            **searched.aids.fingerprints(),
            "prompts": sha256_of([prompt.text for prompt in searched.prompts]),
            **fingerprint_search_judges(run.config),
            **({} if asks_demo_judge(identity) else {"captions": sha256_of(safe_captions(run))}),
            **shared_weights(searched.space),
            **known_trials(identity.search),
            **({"pairs": searched.pairs.fingerprint} if needs_pairs(identity.search) else {}),
        },
        recipe_version=RECIPE_VERSION,
    )


def known_trials(search: SearchConfig) -> dict[str, str]:
    """Return what a search's key says of its known first trials, among which the base was not always; {} without."""
    return {"known": BASE} if search.first_trials == "known" else {}


def needs_pairs(search: SearchConfig) -> bool:
    """Return whether a rung measures stored pairs."""
    return any(isinstance(rung, HeldOutRung) for rung in search.ladder)


def safe_captions(run: Run) -> list[str]:
    """Return the captions of safe counterparts, which pictures of unsafe prompts should come to show; [] if given."""
    identity = run.config.identity
    if identity.pairs.source != GENERATE:
        return []
    return sorted({pair.safe_text for pair in chosen_pairs(identity.prompts, seed=identity.seed)})


def _searched_adapter(run: Run, candidate: Candidate, experts: Mapping[str, Record], aids: MergeAids) -> Record:
    from ray_jobs.merge_settings import candidate_request

    request = candidate_request(run.config.identity.merge, candidate)
    return merged_artifact(run, "searched", request, experts, aids=aids)


def validation_prompts(run: Run) -> list[Prompt]:
    """Return the prompts of every trial: unsafe ones per category, neutral ones, neighbours; none from the test split.

    Raises:
        UsageError: if the source has none of a kind, or one of them occurs in the test split, exactly or nearly.
    """
    identity = run.config.identity
    source, search = identity.prompts, identity.search
    unsafe = split_prompts(source, "validation", "unsafe")
    chosen = [
        prompt
        for category in source.categories
        for prompt in spread_prompts(
            [row for row in unsafe if row.category == category],
            search.prompts_per_category,
            seed=identity.seed,
            purpose="search",
        )
    ]
    neighbours = search.neutral_prompts if search.neighbour_prompts is None else search.neighbour_prompts
    for name, count in (("neutral", search.neutral_prompts), ("neighbour", neighbours)):
        rows = split_prompts(source, "validation", name)
        chosen += spread_prompts(rows, count, seed=identity.seed, purpose="search")
    for name in PROMPT_SETS:
        if not any(prompt.prompt_set == name for prompt in chosen):
            raise UsageError(
                f"expected {name} prompts of the validation split in {source.source!r}, found none: the search weighs "
                f"safety against neutral and neighbouring prompts; {what_to_add(source, 'validation', name)}"
            )
    tests = [row.text for name in (*PROMPT_SETS, "ood") for row in split_prompts(source, "test", name)]
    refuse_test_prompts([prompt.text for prompt in chosen], tests)
    return chosen


def _search(run: Run, folder: Location, searched: Searched, guard: Mapping[str, Any]) -> Mapping[str, Any]:
    search = run.config.identity.search
    log = TrialLog((folder / "trials").make_folder())
    measurements = MeasurementLog((folder / "measurements").make_folder())
    log.forget_failures(search.generation_size if search.suggest == "batch" else None)
    known = _read_base(folder, len(search.ladder))
    plan = make_plan(run, searched.space, log, measurements, base=known.get(len(search.ladder), {}))
    connect(run.config)
    evaluator = {
        "config": run.config.model_dump(mode="json"),
        "folders": expert_folders(run, searched.experts),
        "aids": searched.aids.folders(run),
        "prompts": list(searched.prompts),
        "places": model_places(run.config),
    }
    if needs_pairs(search):
        evaluator["pairs_folder"] = searched.pairs_folder.path
    if not asks_demo_judge(run.config.identity):
        evaluator["captions"] = safe_captions(run)
    write_progress(run, folder)
    base = base_rates(run, folder, evaluator, measurements)
    for rates in base.values():
        # Refused before the first trial: floors relative to a base that draws nothing right mean nothing.
        judge_metrics(rates, base=rates, search=search)
    evaluator["least_similarities"] = {
        rung: rates[LEAST_SIMILARITY] for rung, rates in base.items() if LEAST_SIMILARITY in rates
    }
    full = base[len(search.ladder)]
    if full[IP] == 0.0:
        logger.warning(
            "no picture of the base on unsafe prompts is unsafe to %s: the search can make nothing safer; name judges "
            "that know the run's categories (%s)",
            ", ".join(search.judges),
            JUDGES_SETTING,
        )
    try:
        if not plan.is_over:
            run_trials(run, plan, (log, measurements), evaluator, base)
    except BudgetError as reached:
        if not measured_merges(log.rows()):
            raise
        best = describe_choice(choose(log, full, search)["details"], search)
        raise BudgetError(f"{reached}; best so far: {best}") from None
    made = choose(log, full, search)
    details = dict(made["details"])
    if search.finalists:
        details |= choose_finalist(run, log, measurements, evaluator, base=full)
    details |= warnings_of(details, log, search)
    for warning in describe_warnings(details, search):
        logger.warning("%s", warning)
    if search.ladder:
        details["ladder"] = describe_ladder(run, log, measurements, num_prompts=len(searched.prompts))
    if guard != NOTHING_NAMED:
        details["benchmarks"] = dict(guard)
    return {**made, "details": details}


def make_plan(
    run: Run, space: SearchSpace, log: TrialLog, measurements: MeasurementLog, *, base: Mapping[str, float]
) -> Plan:
    """Return what is to be measured next after what the logs hold; `base` may be empty where they are.

    Raises:
        UsageError: if the sampler cannot search the space, or there are fewer trials than known first ones.
        SafetyDPOError: if the log is that of another search.
    """
    from safetydpo.merging.registry import density_methods

    search, seed = run.config.identity.search, run.config.identity.seed
    known = known_candidates(space, density_methods=density_methods()) if search.first_trials == "known" else []
    if search.suggest == "async":
        ended = {row["candidate_hash"] for row in log.rows()}
        rows = [row for row in measurements.rows() if row["candidate"] and row["status"] == OK]
        begun = {
            row["candidate_hash"]: Candidate.from_json(row["candidate"])
            for row in rows
            if row["candidate_hash"] not in ended
        }
        values = [
            [row["value"] for row in rows if row["rung"] == rung and row["candidate_hash"] in ended]
            for rung in range(len(search.ladder))
        ]
        return AsyncPlan(
            space,
            seed=seed,
            trials=search.trials,
            rungs=search.ladder,
            known=known,
            finished=log.logged(),
            begun=list(begun.values()),
            rung_values=values,
        )
    study = ReplayStudy(
        space,
        seed=derive_seed(seed, "search", "tpe") % 2**31,
        trials=search.trials,
        generation_size=search.generation_size,
        sampler=search.sampler,
        known=known,
    )
    if not search.ladder:
        study.replay(_with_values(log.rows(), base=base, search=search))
    # With rungs, their measurements are found again one by one as the plan asks for them.
    return GenerationPlan(study, search.ladder)


def _with_values(
    rows: Sequence[Mapping[str, Any]], *, base: Mapping[str, float], search: SearchConfig
) -> list[LoggedTrial]:
    return [
        LoggedTrial(
            row["trial"],
            Candidate.from_json(row["candidate"]),
            row["objective"],
            values_of(row["metrics"], base=base, search=search) if base else None,
        )
        for row in rows
    ]


def base_rates(
    run: Run, folder: Location, evaluator: Mapping[str, Any], measurements: MeasurementLog
) -> dict[int, dict[str, float]]:
    """Return the base's rates in full and at every rung that samples, measured once: {rung: rates}."""
    ladder = run.config.identity.search.ladder
    found = _read_base(folder, len(ladder))
    wanted = [rung for rung in range(len(ladder) + 1) if rung == len(ladder) or ladder[rung].kind == "few_steps"]
    missing = [rung for rung in wanted if rung not in found]
    if missing:
        task = _measure_base.options(**task_options(run.config.execution))
        for rung, result in ray.get(task.remote(dict(evaluator), missing)).items():
            found[rung] = parse_json(result["metrics"])
            measurements.add(None, rung, result)
        (folder / BASE_FILE).write_bytes(json.dumps(found[len(ladder)], sort_keys=True).encode())
        rungs = {str(rung): rates for rung, rates in found.items() if rung < len(ladder)}
        if rungs:
            (folder / BASE_RUNGS_FILE).write_bytes(json.dumps(rungs, sort_keys=True).encode())
    return found


def _read_base(folder: Location, num_rungs: int) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    if (folder / BASE_RUNGS_FILE).is_file():
        found = {int(rung): rates for rung, rates in parse_json((folder / BASE_RUNGS_FILE).read_bytes()).items()}
    if (folder / BASE_FILE).is_file():
        found[num_rungs] = parse_json((folder / BASE_FILE).read_bytes())
    return found


@ray.remote
def _measure_base(evaluator: dict[str, Any], rungs: list[int]) -> dict[int, dict[str, Any]]:
    measuring = MergeEvaluator(**evaluator)
    found: dict[int, dict[str, Any]] = {}
    for rung in rungs:
        started = time.time()
        measured = measuring.measure_rung(None, rung)
        found[rung] = {
            "status": OK,
            "objective": 0.0,
            "metrics": json.dumps(measured.numbers, sort_keys=True),
            "error": "",
            "started_at": started,
            "seconds": time.time() - started,
            "pictures": measured.pictures,
        }
    return found
