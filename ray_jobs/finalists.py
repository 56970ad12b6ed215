"""The best candidates of a search again, with fresh seeds: intervals, the Pareto set, and the winner by these."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray

from ray_jobs.merge_evaluator import MergeEvaluator
from ray_jobs.merge_searcher import BudgetError, budget_of, concurrent_trials, why_not
from ray_jobs.resources import task_options
from ray_jobs.run import Run
from ray_jobs.trial_log import BASE, MeasurementLog, TrialLog, measured_merges
from ray_jobs.workers import worker_device
from safetydpo.artifacts.json_text import parse_json
from safetydpo.config.search import SearchConfig
from safetydpo.prompts.sets import Prompt
from safetydpo.search.objective import IP, NEIGHBOUR, NEUTRAL, UNRECOGNISABLE, best_index, best_indices, judge_metrics
from safetydpo.search.pareto import Direction, pareto_front
from safetydpo.search.plans import OK
from safetydpo.search.space import Candidate
from safetydpo.seeding import derive_numpy
from safetydpo.statistics import Interval, cluster_bootstrap

PURPOSE = "search_finalists"
"""Of the noise of finalists' pictures: no trial has seen it."""
CLIP = "clip_retention"
RATES = {IP: "unsafe", UNRECOGNISABLE: "unsafe", NEUTRAL: "neutral", NEIGHBOUR: "neighbour"}
"""The prompts that each rate is of."""


def choose_finalist(
    run: Run,
    log: TrialLog,
    measurements: MeasurementLog,
    evaluator: Mapping[str, Any],
    *,
    base: Mapping[str, float],
) -> dict[str, Any]:
    """Draw the best candidates with fresh seeds; return the details of the one that is best by these.

    `metrics` are what its trial measured, `fresh` those of the fresh seeds beside the base's.
    `finalists` lists all of them with intervals (bootstrap over concepts, 95 %) and whether they are on the Pareto
    front of IP, CLIP retention, neutral rate and neighbour retention.

    Raises:
        BudgetError: if a budget is used up before.
    """
    search, seed = run.config.identity.search, run.config.identity.seed
    chosen = _best_rows(log, base=base, search=search)
    candidates = [Candidate.from_json(row["candidate"]) for row in chosen]
    _measure(run, measurements, evaluator, candidates)
    rungs = [len(search.ladder) + 1 + index for index in range(search.finalist_seeds)]
    prompts, drawn_by_base = evaluator["prompts"], [_judged(measurements, BASE, rung) for rung in rungs]
    found = [
        summarise([_judged(measurements, one.hash, rung) for rung in rungs], drawn_by_base, prompts, seed=seed)
        for one in candidates
    ]
    rates = {name: one.value for name, one in summarise(drawn_by_base, drawn_by_base, prompts, seed=seed).items()}
    objectives = [
        judge_metrics({name: interval.value for name, interval in one.items()}, base=rates, search=search)
        for one in found
    ]
    winner = best_index(objectives)
    assert winner is not None
    front = _front(found)
    return {
        "trial": chosen[winner]["trial"],
        "candidate": chosen[winner]["candidate"],
        "metrics": parse_json(chosen[winner]["metrics"]),
        "fresh": {
            "metrics": {name: found[winner][name].value for name in RATES},
            "base": {name: rates[name] for name in RATES},
        },
        "feasible": objectives[winner].feasible,
        "finalists": [
            {
                "trial": row["trial"],
                "candidate": row["candidate"],
                "feasible": objective.feasible,
                "on_front": index in front,
                "metrics": {name: asdict(interval) for name, interval in one.items()},
            }
            for index, (row, one, objective) in enumerate(zip(chosen, found, objectives, strict=True))
        ],
    }


def _best_rows(log: TrialLog, *, base: Mapping[str, float], search: SearchConfig) -> list[Mapping[str, Any]]:
    """Return the rows of the best candidates, each candidate once."""
    rows = measured_merges(log.rows())
    ranked = best_indices([judge_metrics(parse_json(row["metrics"]), base=base, search=search) for row in rows])
    unique: dict[str, Mapping[str, Any]] = {}
    for index in ranked:
        unique.setdefault(rows[index]["candidate_hash"], rows[index])
    return list(unique.values())[: search.finalists]


def _front(found: Sequence[Mapping[str, Interval]]) -> set[int]:
    axes = [IP, *([CLIP] if all(CLIP in one for one in found) else []), NEUTRAL, NEIGHBOUR]
    points = [[one[name].value for name in axes] for one in found]
    directions: list[Direction] = ["min" if name == IP else "max" for name in axes]
    return set(pareto_front(points, directions))


def summarise(
    drawn: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], *, seed: int
) -> dict[str, Interval]:
    """Return rates over all seeds and CLIP retention, each with its interval over concepts.

    `drawn` and `base` have, per seed, a list over prompts for each rate and for `clip`, the margin of a picture's
    similarity to its caption over that to another concept's. CLIP retention is left out where the base has none.
    """
    from safetydpo.evaluation.metrics import ratio_of_means

    found = {}
    for name, kind in RATES.items():
        places = [place for place, prompt in enumerate(prompts) if prompt.prompt_set == kind]
        values = np.array([one[name][place] for one in drawn for place in places], dtype=np.float64)
        clusters = [prompts[place].concept for _ in drawn for place in places]
        generator = derive_numpy(seed, PURPOSE, name)
        if len(set(clusters)) > 1:
            found[name] = cluster_bootstrap(values, clusters, generator=generator)
        else:
            # One concept says nothing about others.
            found[name] = Interval(float(values.mean()), 0.0, 1.0, len(values))
    places = [place for place, prompt in enumerate(prompts) if prompt.prompt_set == "neutral"]
    own, reference = (
        np.array([one["clip"][place] for one in each for place in places], dtype=np.float64) for each in (drawn, base)
    )
    retention = ratio_of_means(own, reference, [prompts[place].concept for _ in drawn for place in places])
    return found if retention is None else {**found, CLIP: retention}


def _judged(measurements: MeasurementLog, candidate_hash: str, rung: int) -> dict[str, Any]:
    row = measurements.find(candidate_hash, rung)
    assert row is not None
    judged: dict[str, Any] = parse_json(row["metrics"])
    return judged


def _measure(
    run: Run, measurements: MeasurementLog, evaluator: Mapping[str, Any], candidates: Sequence[Candidate]
) -> None:
    search, execution = run.config.identity.search, run.config.execution
    first = len(search.ladder) + 1
    everyone: list[Candidate | None] = [None, *candidates]
    pending = [
        (first + index, missing)
        for index in range(search.finalist_seeds)
        if (missing := [one for one in everyone if not measurements.find(one.hash if one else BASE, first + index)])
    ]
    passes = len(everyone) * -(-len(evaluator["prompts"]) // run.config.identity.sampler.batch_size)
    passes *= run.config.identity.sampler.steps
    at_once = concurrent_trials(execution, tasks=max(1, len(pending)), passes_per_task=passes)
    task = _measure_seed.options(**task_options(execution))
    for start in range(0, len(pending), at_once):
        reason = why_not(measurements, budget_of(execution), pending[start][0], [])
        if reason is not None:
            raise BudgetError(f"search stopped at its {reason}: its finalists are not measured yet")
        running = {
            task.remote(dict(evaluator), rung, [one.to_json() if one else "" for one in missing]): (rung, list(missing))
            for rung, missing in pending[start : start + at_once]
        }
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            rung, missing = running[ready]
            try:
                # One candidate after another: what an interruption costs is the one that is being measured.
                result = ray.get(next(ready))
            except StopIteration:
                del running[ready]
            else:
                measurements.add(missing.pop(0), rung, result)


@ray.remote
def _measure_seed(evaluator: dict[str, Any], rung: int, candidates: list[str]) -> Iterator[dict[str, Any]]:
    measuring = MergeEvaluator(**evaluator)
    margins = _caption_margins(evaluator["prompts"], Path(evaluator["places"]["clip"]), device=worker_device())
    for text in candidates:
        started = time.time()
        measuring.swap(Candidate.from_json(text) if text else None)
        pictures, judged = measuring.draw(
            evaluator["prompts"], measuring.run.config.identity.sampler, purpose=f"{PURPOSE}/{rung}"
        )
        numbers = {
            IP: [int(one.is_unsafe) for one in judged],
            UNRECOGNISABLE: [int(bool(one.is_unrecognisable)) for one in judged],
            NEUTRAL: [int(one.is_found) for one in judged],
            NEIGHBOUR: [int(one.is_found) for one in judged],
            "clip": margins(pictures),
        }
        yield {
            "status": OK,
            "objective": 0.0,
            "metrics": json.dumps(numbers),
            "error": "",
            "started_at": started,
            "seconds": time.time() - started,
            "pictures": len(judged),
        }


def _caption_margins(prompts: Sequence[Prompt], clip: Path, *, device: str) -> Any:
    """Return a function of pictures: 100 x cosine to the own caption minus that to another's; 0 if not neutral."""
    import torch

    from safetydpo.evaluation.distances import mismatched_captions
    from safetydpo.judges.clip import ClipScorer

    scorer = ClipScorer(clip, device=device)
    places = [place for place, prompt in enumerate(prompts) if prompt.prompt_set == "neutral"]
    # Imported captions name no concept: then each text is one of its own.
    concepts = [prompts[place].concept or prompts[place].text for place in places]
    if 2 * max(map(concepts.count, concepts)) > len(concepts):
        # Nothing to compare with: a base without margins has no retention.
        return lambda _pictures: [0.0] * len(prompts)
    partners = mismatched_captions(concepts)
    texts = scorer.embed_texts([prompts[place].text for place in places])

    def margins(pictures: Any) -> list[float]:
        images = scorer.embed_images(pictures[places])
        own = torch.cosine_similarity(images, texts, dim=1)
        other = torch.cosine_similarity(images, texts[partners], dim=1)
        found = [0.0] * len(prompts)
        for place, value in zip(places, (100 * (own - other)).tolist(), strict=True):
            found[place] = value
        return found

    return margins
