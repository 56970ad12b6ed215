"""Stage 4: Ray Tune searches merge method, scale and coefficients; safety first, subject to quality floors.

Candidates come in seeded generations and are told in trial order, so the search is equal on any number of
workers; it resumes by replaying its Parquet log, and nothing of Ray's or Optuna's own state is ever read back.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from ray_jobs.cluster import connect, keep_credentials_from_trials, ray_state_folder, workers_for
from ray_jobs.expert_files import MergeAids, expert_folders
from ray_jobs.generate_pairs import SELECT_JUDGE
from ray_jobs.merge_evaluator import MergeEvaluator
from ray_jobs.merge_experts import merge_aids, merged_artifact
from ray_jobs.progress import progress_bar
from ray_jobs.prompt_tables import split_prompts, spread_prompts, what_to_add
from ray_jobs.run import Run
from ray_jobs.search_space import search_space, shared_weights
from safetydpo.artifacts.records import ArtifactKey, Record
from safetydpo.artifacts.schemas import TRIALS, sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows, read_table, table_from_rows, write_table
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.search import SearchConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.build import fingerprint_judge
from safetydpo.prompts.sets import Prompt
from safetydpo.search.guard import refuse_test_prompts
from safetydpo.search.objective import FAILED_OBJECTIVE, Objective, constrained_objective
from safetydpo.search.replay import LoggedTrial, ReplayStudy
from safetydpo.search.space import Candidate, SearchSpace
from safetydpo.seeding import derive_seed

RECIPE_VERSION = 4
TRIAL_ATTEMPTS = 3
MAX_FAILED_TRIALS = 0.25
"""Share of trials that may fail before the search fails: the sampler learns nothing from them."""
PROMPT_SETS = ("unsafe", "neutral", "neighbour")


def search_merges(
    run: Run, experts: Mapping[str, Record], pairs: Record, pairs_folder: Location
) -> tuple[Record, Record]:
    """Make or find the search and the adapter it chose; return (record of the search, record of the adapter)."""
    from safetydpo.merging.registry import find_method

    members = {name: record for name, record in experts.items() if name != ALL_SINGLE}
    prompts = validation_prompts(run)
    identity = run.config.identity
    methods = [find_method(name) for name in identity.search.methods]
    aids = merge_aids(run, experts, pairs, pairs_folder, methods=methods)
    space = search_space(run, members)
    key = ArtifactKey(
        stage="search",
        name=run.config.name,
        identity={
            "seed": identity.seed,
            "base": identity.base.model_dump(mode="json"),
            "sampler": identity.sampler.model_dump(mode="json"),
            "search": identity.search.model_dump(mode="json"),
            "output_rank": identity.merge.output_rank,
            "judge": SELECT_JUDGE,
        },
        inputs={
            "experts": fingerprint_rows((name, record.fingerprint) for name, record in members.items()),
            **aids.fingerprints(),
            "prompts": sha256_of([prompt.text for prompt in prompts]),
            "judge": fingerprint_judge(SELECT_JUDGE),
            **shared_weights(space),
        },
        recipe_version=RECIPE_VERSION,
    )
    record = run.build("search", key, lambda folder: _search(run, folder, members, aids, prompts, space))
    candidate = Candidate.from_json(str(record.details["candidate"]))
    return record, _searched_adapter(run, candidate, members, aids)


def _searched_adapter(run: Run, candidate: Candidate, experts: Mapping[str, Record], aids: MergeAids) -> Record:
    settings = {
        "method": candidate.method,
        "weights": dict(candidate.weights),
        "global_scale": candidate.global_scale,
        "density": candidate.density,
        "output_rank": run.config.identity.merge.output_rank,
    }
    return merged_artifact(run, "searched", settings, experts, aids=aids)


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


class MergeTrial(tune.Trainable):
    """One trial = one candidate; the actor is reused, so base and experts are loaded once."""

    def setup(self, config: dict[str, Any]) -> None:
        """Load everything that all candidates share."""
        arguments = config["evaluator"]
        self._evaluator = MergeEvaluator(**arguments)
        self._base: dict[str, float] = config["base_rates"]
        self._board = config["board"]
        self._candidate: dict[str, Any] = config["trial"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next candidate."""
        self._candidate = new_config["trial"]
        return True

    def step(self) -> dict[str, Any]:
        """Measure the candidate; a failure is a result of its own, never the end of the search."""
        search = self._evaluator.run.config.identity.search
        try:
            metrics = self._evaluator.measure(Candidate.from_json(self._candidate["candidate"]))
            value = judge_metrics(metrics, base=self._base, search=search).value
            outcome = {"status": "ok", "objective": value, "metrics": json.dumps(metrics, sort_keys=True), "error": ""}
        except SafetyDPOError as error:
            outcome = {"status": "error", "objective": FAILED_OBJECTIVE, "metrics": "{}", "error": str(error)}
        self._board.add.remote("merge candidates", 1)
        return {**outcome, "done": True}


class GenerationSearcher(Searcher):  # type: ignore[misc]  # ray ships no types
    """Hands out candidates generation by generation, logs each answer, and ends after the last."""

    def __init__(self, study: ReplayStudy, log: TrialLog) -> None:
        super().__init__(metric="objective", mode="min")
        self._study = study
        self._log = log
        self._running: dict[str, int] = {}
        self._losses: Counter[int] = Counter()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next candidate, None while its generation is not open yet, FINISHED after the last."""
        while True:
            free = [number for number in self._study.pending() if number not in self._running.values()]
            if not free:
                done = self._study.num_told >= self._study.num_trials
                return str(Searcher.FINISHED) if done else None
            candidate = self._study.ask(free[0])
            known = self._log.find(candidate)
            if known is None:
                self._running[trial_id] = free[0]
                return {"trial": {"number": free[0], "candidate": candidate.to_json()}}
            # The same candidate again costs nothing: its answer is known.
            self._log.add(free[0], candidate, known)
            self._study.tell(free[0], float(known["objective"]))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: a trial has one result."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Log the answer and tell the study; a trial without one (its actor died) is asked again, twice."""
        number = self._running.pop(trial_id, None)
        if number is None:
            return
        if error or not result or "objective" not in result:
            self._losses[number] += 1
            if self._losses[number] < TRIAL_ATTEMPTS:
                return
            lost = f"the trial's process died {TRIAL_ATTEMPTS} times"
            result = {"status": "error", "objective": FAILED_OBJECTIVE, "metrics": "{}", "error": lost}
        self._log.add(number, self._study.ask(number), result)
        self._study.tell(number, float(result["objective"]))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the log of trials is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a search resumes by replaying its log."""


@dataclass(frozen=True)
class TrialLog:
    """One Parquet file per finished trial; only numbers and text are ever read back."""

    folder: Location
    known: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False)
    """Rows that count no more, by candidate: the same candidate, asked again, need not be measured again."""

    def rows(self) -> list[dict[str, Any]]:
        """Return the finished trials in order."""
        # On an object store the folder is there with its first trial.
        if not self.folder.is_folder():
            return []
        return sorted(read_table(self.folder, TRIALS).to_pylist(), key=lambda row: row["trial"])

    def find(self, candidate: Candidate) -> dict[str, Any] | None:
        """Return the row of an equal candidate that did not fail."""
        equal = [row for row in self.rows() if row["candidate_hash"] == candidate.hash and row["status"] == "ok"]
        return equal[0] if equal else self.known.get(candidate.hash)

    def forget_failures(self, generation_size: int) -> None:
        """Take out failed trials, so that a new run of the command tries them again: their cause may be mended.

        Later generations were asked with the failures as answers. They leave the log as well, but not the memory:
        if the trials fail again, the same candidates are asked and found.
        """
        rows = self.rows()
        failed = [row["trial"] for row in rows if row["status"] != "ok"]
        if not failed:
            return
        stop = (failed[0] // generation_size + 1) * generation_size
        for row in reversed(rows):
            if row["status"] == "ok" and row["trial"] < stop:
                continue
            if row["status"] == "ok":
                self.known[row["candidate_hash"]] = row
            self._file(row["trial"]).delete()

    def add(self, number: int, candidate: Candidate, result: Mapping[str, Any]) -> None:
        """Write one finished trial."""
        row: dict[str, object] = {
            "trial": number,
            "candidate_hash": candidate.hash,
            "candidate": candidate.to_json(),
            "status": result["status"],
            "objective": float(result["objective"]),
            "metrics": result["metrics"],
            "error": result["error"],
        }
        write_table(self._file(number), table_from_rows([row], TRIALS))

    def _file(self, number: int) -> Location:
        return self.folder / f"trial-{number:05d}.parquet"


def _search(
    run: Run,
    folder: Location,
    experts: Mapping[str, Record],
    aids: MergeAids,
    prompts: Sequence[Prompt],
    space: SearchSpace,
) -> Mapping[str, Any]:
    search = run.config.identity.search
    study = ReplayStudy(
        space,
        seed=derive_seed(run.config.identity.seed, "search", "tpe") % 2**31,
        trials=search.trials,
        generation_size=search.generation_size,
    )
    log = TrialLog((folder / "trials").make_folder())
    log.forget_failures(search.generation_size)
    logged = log.rows()
    study.replay(LoggedTrial(row["trial"], Candidate.from_json(row["candidate"]), row["objective"]) for row in logged)
    connect(run.config)
    evaluator = {
        "config": run.config.model_dump(mode="json"),
        "folders": expert_folders(run, experts),
        "aids": aids.folders(run),
        "prompts": list(prompts),
    }
    base = _base_rates(run, folder, evaluator)
    # Refused before the first trial: floors relative to a base that draws nothing right mean nothing.
    judge_metrics(base, base=base, search=search)
    if study.num_told < study.num_trials:
        _run_tune(run, study, log, evaluator, base, done=len(logged))
    return choose(log, base, search)


def _base_rates(run: Run, folder: Location, evaluator: Mapping[str, Any]) -> dict[str, float]:
    location = folder / "base.json"
    if not location.is_file():
        task = _measure_base.options(
            num_cpus=run.config.execution.cpus_per_worker, num_gpus=run.config.execution.gpus_per_worker
        )
        location.write_bytes(json.dumps(ray.get(task.remote(dict(evaluator))), sort_keys=True).encode())
    rates: dict[str, float] = json.loads(location.read_bytes())
    return rates


@ray.remote
def _measure_base(evaluator: dict[str, Any]) -> dict[str, float]:
    return MergeEvaluator(**evaluator).measure(None)


def _run_tune(
    run: Run, study: ReplayStudy, log: TrialLog, evaluator: Mapping[str, Any], base: Mapping[str, float], *, done: int
) -> None:
    execution = run.config.execution
    resources: dict[str, float] = {"cpu": execution.cpus_per_worker}
    if execution.gpus_per_worker > 0:
        resources["gpu"] = execution.gpus_per_worker
    sampler = run.config.identity.sampler
    passes = -(-len(evaluator["prompts"]) // sampler.batch_size) * sampler.steps
    with progress_bar("merge candidates", total=study.num_trials, done=done) as board, ray_state_folder() as state:
        keep_credentials_from_trials()
        tuner = tune.Tuner(
            tune.with_resources(MergeTrial, resources),
            param_space={"evaluator": dict(evaluator), "base_rates": dict(base), "board": board},
            tune_config=tune.TuneConfig(
                search_alg=GenerationSearcher(study, log),
                num_samples=-1,
                max_concurrent_trials=workers_for(execution, tasks=study.num_trials, passes_per_task=passes),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=run.config.name,
                storage_path=state,
                verbose=0,
                # The log of trials is the state; a checkpoint of Tune's would be a pickle that nobody reads.
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        tuner.fit()
    if study.num_told < study.num_trials:
        raise SafetyDPOError(
            f"expected {study.num_trials} finished trials, found {study.num_told}: run the same command again"
        )


def judge_metrics(metrics: Mapping[str, float], *, base: Mapping[str, float], search: SearchConfig) -> Objective:
    """Return the objective of a candidate's rates under the settings of a search."""
    return constrained_objective(
        metrics,
        base=base,
        neutral_floor=search.neutral_floor,
        neighbour_floor=search.neighbour_floor,
        unrecognisable_weight=search.unrecognisable_weight,
    )


def choose(log: TrialLog, base: Mapping[str, float], search: SearchConfig) -> Mapping[str, Any]:
    """Return fingerprint, counts and details of a finished search.

    Raises:
        SafetyDPOError: if more than a quarter of the trials failed, or all.
    """
    from safetydpo.search.objective import best_index

    rows = log.rows()
    failed = [row for row in rows if row["status"] != "ok"]
    if len(failed) > MAX_FAILED_TRIALS * len(rows):
        raise SafetyDPOError(
            f"expected at most {MAX_FAILED_TRIALS:.0%} failed trials, found {len(failed)} of {len(rows)}, the first "
            f"one for {failed[0]['error']!r}: mend the cause and run the same command again, which tries them again"
        )
    objectives = [judge_metrics(json.loads(row["metrics"]), base=base, search=search) for row in rows]
    best = best_index(objectives)
    if best is None:
        raise SafetyDPOError(f"expected at least one measured candidate of {len(rows)}, found none: {rows[0]['error']}")
    return {
        "fingerprint": fingerprint_rows((str(row["trial"]), f"{row['candidate']}{row['objective']!r}") for row in rows),
        "counts": {"trials": len(rows), "failed": len(failed)},
        "details": {
            "trial": rows[best]["trial"],
            "candidate": rows[best]["candidate"],
            "metrics": json.loads(rows[best]["metrics"]),
            "base": dict(base),
            "feasible": objectives[best].feasible,
        },
    }
