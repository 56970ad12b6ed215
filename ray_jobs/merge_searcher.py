"""What Ray Tune runs in a search: trials that measure candidates, and the searcher that hands them out."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from ray_jobs.cluster import keep_credentials_from_trials
from ray_jobs.merge_evaluator import MergeEvaluator
from ray_jobs.metrics import set_gauge
from ray_jobs.progress import progress_bar
from ray_jobs.resources import at_most, workers_for
from ray_jobs.run import Run, run_id
from ray_jobs.run_context import current, enter
from ray_jobs.state_folder import ray_state_folder
from ray_jobs.trial_log import MeasurementLog, TrialLog, best_trial
from safetydpo.artifacts.json_text import parse_json
from safetydpo.config.rungs import HeldOutRung
from safetydpo.config.schema import ExecutionConfig
from safetydpo.config.search import SearchConfig
from safetydpo.errors import SafetyDPOError
from safetydpo.search.budget import Budget, price_per_second, typical_seconds, why_not_start
from safetydpo.search.objective import FAILED_OBJECTIVE, judge_metrics, objective_values
from safetydpo.search.plans import OK, STOPPED, Ended, Outcome, Plan, Task
from safetydpo.search.proxy_value import proxy_value
from safetydpo.search.space import Candidate

logger = logging.getLogger(__name__)
LABEL = "merge candidates"
TRIAL_ATTEMPTS = 3
MAX_CAUSE = 500
"""Characters of an error that are kept."""


class BudgetError(SafetyDPOError):
    """A search ended at one of its budgets, with all of its measurements whole; the same command goes on."""


class MergeTrial(tune.Trainable):
    """One trial = one candidate at one rung; the actor is reused, so base and experts are loaded once."""

    def setup(self, config: dict[str, Any]) -> None:
        """Load everything that all candidates share."""
        enter(config["context"])
        self._evaluator = MergeEvaluator(**config["evaluator"])
        self._base: dict[int, dict[str, float]] = config["base_rates"]
        self._candidate: dict[str, Any] = config["trial"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next candidate."""
        self._candidate = new_config["trial"]
        return True

    def step(self) -> dict[str, Any]:
        """Measure the candidate; a failure is a result of its own, never the end of the search.

        An error of another kind ends the process, for what it holds may be broken (a GPU's error stays in it): the
        trial is tried again in a fresh one.
        """
        rung, started = int(self._candidate["rung"]), time.time()
        outcome = {"status": "error", "objective": FAILED_OBJECTIVE, "metrics": "{}", "error": "", "pictures": 0}
        try:
            measured = self._evaluator.measure_rung(Candidate.from_json(self._candidate["candidate"]), rung)
            value = value_at(rung, measured.numbers, base=self._base, search=self._evaluator.run.config.identity.search)
            metrics = json.dumps(measured.numbers, sort_keys=True)
            outcome |= {"status": OK, "objective": value, "metrics": metrics, "pictures": measured.pictures}
        except SafetyDPOError as error:
            outcome["error"] = str(error)
        return {**outcome, "started_at": started, "seconds": time.time() - started, "done": True}


def value_at(
    rung: int, numbers: Mapping[str, float], *, base: Mapping[int, Mapping[str, float]], search: SearchConfig
) -> float:
    """Return what a rung, or the full evaluation above the last one, minimises."""
    settings = search.ladder[rung] if rung < len(search.ladder) else None
    if isinstance(settings, HeldOutRung):
        return proxy_value(numbers, settings)
    return judge_metrics(numbers, base=base[rung], search=search).value


def values_of(metrics: str, *, base: Mapping[str, float], search: SearchConfig) -> tuple[float, ...]:
    """Return what a sampler of several objectives is told of logged metrics (JSON)."""
    return objective_values(parse_json(metrics), base=base, unrecognisable_weight=search.unrecognisable_weight)


class MergeSearcher(Searcher):  # type: ignore[misc]  # ray ships no types
    """Hands out what a plan asks for, logs each answer, and ends after the last one or at a budget.

    Attributes:
        stopped_by: the budget at which no more was started; None = none.
    """

    def __init__(
        self,
        plan: Plan,
        log: TrialLog,
        measurements: MeasurementLog,
        *,
        num_rungs: int = 0,
        why_not: Callable[[Task, Sequence[float]], str | None] = lambda _task, _running_since: None,
        values: Callable[[str], tuple[float, ...] | None] = lambda _metrics: None,
        known: Callable[[Task], Mapping[str, Any] | None] = lambda _task: None,
        on_ended: Callable[[int], object] = lambda _count: None,
    ) -> None:
        super().__init__(metric="objective", mode="min")
        self.stopped_by: str | None = None
        self._plan, self._log, self._measurements, self._num_rungs = plan, log, measurements, num_rungs
        self._why_not, self._values, self._known, self._on_ended = why_not, values, known, on_ended
        self._running: dict[str, tuple[Task, float]] = {}
        self._losses: Counter[Task] = Counter()
        self._lost: dict[str, Task] = {}
        self._causes: dict[Task, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next task, None while it waits for those that run, FINISHED after the last or at a budget."""
        while True:
            if self._plan.is_over or self.stopped_by is not None:
                return str(Searcher.FINISHED)
            task = self._plan.next_task([running for running, _ in self._running.values()])
            if task is None:
                return None
            known = self._find(task)
            if known is not None:
                # The same candidate again costs nothing: its answer is known.
                self._record(task, known)
                continue
            self.stopped_by = self._why_not(task, [since for _, since in self._running.values()])
            if self.stopped_by is not None:
                self._plan.give_back(task)
                continue
            self._running[trial_id] = (task, time.time())
            return {"trial": {"number": task.trial, "rung": task.rung, "candidate": task.candidate.to_json()}}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: a trial has one result."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Log the answer and tell the plan; a trial without one (its actor died) is asked again, twice."""
        task, _ = self._running.pop(trial_id, (None, 0.0))
        if task is None:
            return
        if error or not result or "objective" not in result:
            self._losses[task] += 1
            if self._losses[task] < TRIAL_ATTEMPTS:
                self._plan.give_back(task)
                self._lost[trial_id] = task
                return
            cause = self._causes.get(task, "it said nothing")
            lost = f"the trial's process ended without an answer {TRIAL_ATTEMPTS} times: {cause}"
            logger.warning("trial %d failed at rung %d: %s", task.trial, task.rung, lost)
            result = {"status": "error", "objective": FAILED_OBJECTIVE, "metrics": "{}", "error": lost}
        else:
            self._measurements.add(task.candidate, task.rung, result)
        self._record(task, result)

    def tell_cause(self, trial_id: str, cause: str) -> None:
        """Keep what a trial without an answer said, for its row should all attempts end like this one."""
        task = self._lost.pop(trial_id, None)
        if task is not None:
            self._causes[task] = cause

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the log of trials is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a search resumes from its log."""

    def _find(self, task: Task) -> Mapping[str, Any] | None:
        known = self._known(task)
        if known is None and task.rung == self._num_rungs:
            known = self._log.find(task.candidate)
        if known is not None:
            return known
        measured = self._measurements.find(task.candidate.hash, task.rung)
        return None if measured is None else {**measured, "objective": measured["value"]}

    def _record(self, task: Task, result: Mapping[str, Any]) -> None:
        is_full, is_failure = task.rung == self._num_rungs, result["status"] != OK
        values = self._values(result["metrics"]) if is_full or is_failure else None
        ended = self._plan.record(task, Outcome(float(result["objective"]), is_failure, values))
        for one in ended:
            self._log_ended(one, result)
        if ended:
            self._on_ended(len(ended))

    def _log_ended(self, ended: Ended, result: Mapping[str, Any]) -> None:
        if ended.status == STOPPED:
            stopped = json.dumps({"stopped_at": ended.rung})
            result = {"status": STOPPED, "objective": ended.value, "metrics": stopped, "error": ""}
        logged = self._log.row(ended.trial)
        if logged is None:
            self._log.add(ended.trial, ended.candidate, result)
        elif logged["candidate_hash"] != ended.candidate.hash:
            raise SafetyDPOError(
                f"trial {ended.trial} of the log differs from the search as asked now: expected {logged['candidate']} "
                f"(logged), found {ended.candidate.to_json()}. Settings, experts or the optuna version changed: search "
                "into a new folder."
            )


class _Causes(tune.Callback):  # type: ignore[misc]  # ray ships no types
    """Tells a searcher why trials ended without an answer: Tune tells searchers only that they did."""

    def __init__(self, searcher: MergeSearcher) -> None:
        self._searcher = searcher

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Read the last line of the trial's file of errors, which names the error."""
        lines = Path(trial.error_file).read_text(errors="replace").splitlines() if trial.error_file else []
        said = [line.strip() for line in lines if line.strip()]
        if said:
            self._searcher.tell_cause(trial.trial_id, said[-1][:MAX_CAUSE])


def known_of_base(
    task: Task, *, base: Mapping[int, Mapping[str, float]], search: SearchConfig
) -> Mapping[str, Any] | None:
    """Return the answer of a trial that is the base without an adapter, where its rates were measured already."""
    if not task.candidate.is_base or task.rung not in base:
        return None
    value = value_at(task.rung, base[task.rung], base=base, search=search)
    return {"status": OK, "objective": value, "metrics": json.dumps(base[task.rung], sort_keys=True), "error": ""}


def budget_of(execution: ExecutionConfig) -> Budget:
    """Return the budgets of a run's search."""
    limits = execution.search
    price = price_per_second(
        cpus=execution.cpus_per_worker,
        gpus=execution.gpus_per_worker,
        per_cpu_hour=limits.price_per_cpu_hour,
        per_gpu_hour=limits.price_per_gpu_hour,
    )
    return Budget(limits.time_budget_s, limits.cost_budget, price)


def why_not(measurements: MeasurementLog, budget: Budget, rung: int, running_since: Sequence[float]) -> str | None:
    """Return which budget a measurement at a rung would break now; None = it fits."""
    return why_not_start(
        measurements.spans(),
        running_since=running_since,
        now=time.time(),
        budget=budget,
        typical_seconds=typical_seconds([span.seconds for span in measurements.spans(rung)]),
    )


def concurrent_trials(execution: ExecutionConfig, *, tasks: int, passes_per_task: int) -> int:
    """Return how many trials run at a time: what the work is worth, within all limits of the search."""
    limits = execution.search
    found = workers_for(execution, tasks=tasks, passes_per_task=passes_per_task)
    if limits.max_concurrent_trials is not None:
        found = min(found, limits.max_concurrent_trials)
    return at_most(found, limits.max_gpus, execution.gpus_per_worker)


def _tell_ended(board: Any, log: TrialLog, base: Mapping[str, float], search: SearchConfig, count: int) -> None:
    board.add.remote(LABEL, count)
    best = best_trial(log.rows(), base=base, search=search)
    if best is not None:
        set_gauge("safetydpo_best_objective", best["objective"])


def run_trials(
    run: Run,
    plan: Plan,
    logs: tuple[TrialLog, MeasurementLog],
    evaluator: Mapping[str, Any],
    base: Mapping[int, Mapping[str, float]],
) -> None:
    """Measure what the plan asks for until it is over.

    Raises:
        BudgetError: if a budget ended it before; everything measured is in the logs.
        SafetyDPOError: if Ray Tune ended before the plan was over.
    """
    search, execution = run.config.identity.search, run.config.execution
    log, measurements = logs
    budget = budget_of(execution)
    bundle = {"CPU": execution.cpus_per_worker, "GPU": execution.gpus_per_worker}
    labels = [dict(execution.label_selector)] if execution.label_selector else None
    resources = tune.PlacementGroupFactory([bundle], bundle_label_selector=labels)
    sampler = run.config.identity.sampler
    passes = -(-len(evaluator["prompts"]) // sampler.batch_size) * sampler.steps
    done = len(log.rows())
    with progress_bar(LABEL, total=search.trials, done=done) as board, ray_state_folder() as state:
        keep_credentials_from_trials()
        searcher = MergeSearcher(
            plan,
            log,
            measurements,
            num_rungs=len(search.ladder),
            why_not=lambda task, since: why_not(measurements, budget, task.rung, since),
            values=lambda metrics: values_of(metrics, base=base[len(search.ladder)], search=search),
            known=partial(known_of_base, base=base, search=search),
            on_ended=partial(_tell_ended, board, log, base[len(search.ladder)], search),
        )
        tuner = tune.Tuner(
            tune.with_resources(MergeTrial, resources),
            param_space={"evaluator": dict(evaluator), "base_rates": dict(base), "context": current().told()},
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,
                max_concurrent_trials=concurrent_trials(execution, tasks=search.trials, passes_per_task=passes),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=run_id(run.config),
                storage_path=state,
                verbose=0,
                callbacks=[_Causes(searcher)],
                # The log of trials is the state; a checkpoint of Tune's would be a pickle that nobody reads.
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        tuner.fit()
    if plan.is_over:
        return
    ended = len(log.rows())
    if searcher.stopped_by is not None:
        raise BudgetError(f"search stopped at its {searcher.stopped_by}: {ended} of {search.trials} trials have ended")
    raise SafetyDPOError(f"expected {search.trials} finished trials, found {ended}: run the same command again")
