"""Which cheap measurement of a merge ranks merges as their full evaluation does.

Usage: python -m benchmarks.search_proxies CONFIG [--set key.path=value …] [--candidates 24] [--pairs held_out | all]

CONFIG is a run whose merge stage is closed; with `--pairs held_out` its trainings held pairs out
(identity.dpo.validation.every_steps). Candidates are the plain ones of the run's search space and random ones. Each is
measured in full on the search's own prompts, by every proxy of `search.proxy` on all timesteps and on thirds of them,
and by few steps of sampling on few prompts. Printed are Spearman's and Kendall's rank correlation with the objective of
the search, on all candidates and on those that keep the floors, and what each measurement costs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks.harness import print_result
from benchmarks.search import open_evaluator
from ray_jobs.failures import run_guarded
from ray_jobs.held_out_rung import open_questions
from ray_jobs.merge_evaluator import MergeEvaluator, small_set
from ray_jobs.run import Run, with_absolute_paths
from ray_jobs.sampled_rates import count_shares
from ray_jobs.search_merges import validation_prompts
from safetydpo.artifacts.records import read_pointers
from safetydpo.config.load import load_config
from safetydpo.config.rungs import FewStepsRung, HeldOutRung, Proxy
from safetydpo.config.schema import Config
from safetydpo.merging.registry import density_methods, unweighted_methods
from safetydpo.search.ladder import rank_correlation
from safetydpo.search.objective import judge_metrics
from safetydpo.search.proxy_value import proxy_value
from safetydpo.search.replay import ReplayStudy
from safetydpo.search.space import Candidate, build_space

THIRDS: Mapping[str, tuple[int, int] | None] = {
    "all": None,
    "low noise": (0, 332),
    "middle": (333, 665),
    "high noise": (666, 999),
}
CEILINGS = ("safe_rise_max", "benign_rise_max", "prompt_shift_max")
SMALL = FewStepsRung(steps=3, prompts_per_category=2, neutral_prompts=7, neighbour_prompts=7)


def candidates_of(run: Run, experts: Sequence[str], count: int) -> list[Candidate]:
    """Return the plain candidates of the run's space and then random ones."""
    search = run.config.identity.search
    space = build_space(
        search, experts, density_methods=density_methods(), unweighted_methods=unweighted_methods(), groups=None
    )
    study = ReplayStudy(space, seed=7, trials=count, generation_size=count, sampler="random")
    return [study.ask(trial) for trial in range(count)]


def measure(config: Config, *, count: int, pairs: str, log: Path) -> list[dict[str, Any]]:
    """Return the numbers of every candidate; those in the log (JSON lines) are not measured again."""
    run = Run(with_absolute_paths(config))
    pointers = read_pointers(run.run_dir)
    evaluator = open_evaluator(run)
    folder = run.store / "pairs" / pointers["pairs"]["folder"]
    rungs = {
        name: HeldOutRung.model_validate({"pairs": pairs, "benign_pictures": 32, "timestep_range": span})
        for name, span in THIRDS.items()
    }
    prompts = validation_prompts(run)
    opened = {
        name: open_questions(run, rung, folder, evaluator.backbone, prompts=prompts) for name, rung in rungs.items()
    }
    names = [name.removeprefix("expert:") for name in pointers if name.startswith("expert:")]
    known = {line["candidate"]: line for line in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    found = []
    for candidate in [None, *candidates_of(run, [name for name in names if name != "all_single"], count)]:
        text = "" if candidate is None else candidate.to_json()
        if text not in known:
            known[text] = {"candidate": text, **_measure_one(evaluator, candidate, opened)}
            with log.open("a") as lines:
                lines.write(json.dumps(known[text]) + "\n")
            print(json.dumps(known[text]), flush=True)
        found.append(known[text])
    return found


def _measure_one(evaluator: MergeEvaluator, candidate: Candidate | None, opened: Mapping[str, Any]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    evaluator.swap(candidate)
    for name, questions in opened.items():
        started = time.perf_counter()
        numbers[name] = questions.numbers(evaluator.backbone)
        seconds[name] = time.perf_counter() - started
    identity, prompts = evaluator.run.config.identity, validation_prompts(evaluator.run)
    for name, chosen, steps in (("few", small_set(prompts, SMALL), SMALL.steps), ("full", prompts, None)):
        started = time.perf_counter()
        sampler = identity.sampler if steps is None else identity.sampler.model_copy(update={"steps": steps})
        _, judged = evaluator.draw(chosen, sampler)
        numbers[name] = count_shares(judged, judge=evaluator.judge.name)
        seconds[name] = time.perf_counter() - started
    return {"numbers": numbers, "seconds": seconds}


def correlations(config: Config, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return {measurement: correlation with the objective}, on all candidates and on those that keep the floors."""
    search, base = config.identity.search, rows[0]["numbers"]
    full = [judge_metrics(row["numbers"]["full"], base=base["full"], search=search) for row in rows[1:]]
    values: dict[str, list[float]] = {
        "few steps": [judge_metrics(row["numbers"]["few"], base=base["few"], search=search).value for row in rows[1:]]
    }
    for span in THIRDS:
        for proxy in get_args(Proxy):
            for name, ceilings in (("", True), (" without ceilings", False)):
                limits = {} if ceilings else dict.fromkeys(CEILINGS, 1e9)
                rung = HeldOutRung(proxy=proxy, **limits)
                values[f"{proxy}, {span}{name}"] = [proxy_value(row["numbers"][span], rung) for row in rows[1:]]
        for damage in ("safe_rise", "benign_rise", "neutral_shift", "neighbour_shift"):
            values[f"{damage}, {span}"] = [row["numbers"][span][damage] for row in rows[1:]]
    found = {}
    for name, measured in values.items():
        kept = [place for place, one in enumerate(full) if one.feasible]
        everyone = rank_correlation(measured, [one.value for one in full])
        feasible = rank_correlation([measured[place] for place in kept], [full[place].value for place in kept])
        found[name] = {"all": vars(everyone), "feasible": vars(feasible)}
    return found


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="key.path=value settings, as for safetydpo")
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--pairs", choices=("held_out", "all"), default="held_out")
    parser.add_argument("--log", type=Path, default=Path("search-proxies.jsonl"), help="what is measured already")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    rows = measure(config, count=arguments.candidates, pairs=arguments.pairs, log=arguments.log)
    found = correlations(config, rows)
    for name, one in sorted(found.items(), key=lambda item: -(item[1]["all"]["spearman"] or 0.0)):
        told = "  ".join(f"{which} {one[which]['spearman']} / {one[which]['kendall']}" for which in one)
        print(f"{name:44} {told}")
    cost = {name: sum(row["seconds"][name] for row in rows) / len(rows) for name in rows[0]["seconds"]}
    ratios = {f"full / {name}, seconds": cost["full"] / value for name, value in cost.items() if name != "full"}
    print_result("search_proxies", ratios=ratios, raw={"correlations": found, "seconds": cost, "rows": rows})


if __name__ == "__main__":
    sys.exit(run_guarded(main, debug=False))
