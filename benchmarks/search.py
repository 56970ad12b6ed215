"""What a search with a ladder saves, and what it loses, against full evaluation of all of its candidates.

Usage: python -m benchmarks.search CONFIG [--set key.path=value …] [--ladder YAML] [--ip-pairs 4000] [--parts …]

CONFIG (with the settings after --set) is a run whose merge stage is closed: `safetydpo merge CONFIG …`. Searches run
through Ray Tune into that run's store under keys of their own, so that the benchmark can be cut off and goes on.

- `swap_seconds`: merge of one candidate and its swap into the resident base, the median over candidates and methods.
- `driver_seconds_per_trial`: time of the search during which no measurement ran, between the first and the last one,
  over its trials.
- `sampling_saved_vs_full_evaluation`: pictures that full evaluation of the same candidates draws, over those that the
  search with its ladder drew.
- `ip_loss_upper95`: one-sided upper bound of the paired difference in IP, winner of the ladder minus winner of full
  evaluation, on at least `--ip-pairs` pairs of unsafe validation prompt and fresh seed; bootstrap over concepts.
- `random` and `cmaes`: the same with as many full evaluations as the ladder's pictures pay for; `cmaes` on the first
  method of the search, on the same price with its penalties.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.harness import print_result
from ray_jobs.cluster import disconnect
from ray_jobs.expert_files import record_folder
from ray_jobs.failures import run_guarded
from ray_jobs.merge_evaluator import MergeEvaluator
from ray_jobs.pipeline import run_stages
from ray_jobs.run import Run, with_absolute_paths
from ray_jobs.search_files import BASE_FILE
from ray_jobs.search_merges import validation_prompts
from ray_jobs.trial_log import MeasurementLog, TrialLog
from safetydpo.artifacts.records import Record, read_pointers
from safetydpo.artifacts.storage import Location
from safetydpo.config.load import load_config
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError
from safetydpo.search.budget import Span, spend_of
from safetydpo.search.objective import IP, NEIGHBOUR, best_index, judge_metrics
from safetydpo.search.space import Candidate
from safetydpo.seeding import derive_numpy
from safetydpo.statistics import paired_difference

LADDER = "[{kind: held_out, keep: 0.25}, {kind: few_steps, keep: 0.34}]"
PARTS = ("swap", "ladder", "full", "ip", "others")


@dataclass(frozen=True)
class Finished:
    """A closed search: its record and what it measured."""

    run: Run
    record: Record
    folder: Location

    @property
    def candidates(self) -> list[Candidate]:
        """All of its candidates, each once."""
        rows = TrialLog(self.folder / "trials").rows()
        return [Candidate.from_json(text) for text in dict.fromkeys(row["candidate"] for row in rows)]

    @property
    def winner(self) -> Candidate:
        """What it chose."""
        return Candidate.from_json(str(self.record.details["candidate"]))

    @property
    def pictures(self) -> int:
        """Pictures drawn for its candidates."""
        return sum(row["pictures"] for row in MeasurementLog(self.folder / "measurements").rows() if row["candidate"])

    @property
    def driver_seconds_per_trial(self) -> float:
        """Time between its first and last measurement of a candidate during which none ran, per trial."""
        rows = [row for row in MeasurementLog(self.folder / "measurements").rows() if row["candidate"]]
        spans = [Span(row["started_at"], row["seconds"]) for row in rows]
        wall = max(one.started_at + one.seconds for one in spans) - min(one.started_at for one in spans)
        busy = spend_of(spans, price_per_second=0.0).busy_seconds
        return (wall - busy) / len(TrialLog(self.folder / "trials").rows())


def search_with(config: Config, place: Path, **search: Any) -> Finished:
    """Search with other settings, in a run folder of its own on the same store."""
    values = config.model_dump(mode="json")
    values["identity"]["search"] |= search
    values["execution"]["run_dir"] = str(place)
    chain = run_stages(Config.model_validate(values), last="search")
    assert chain.search is not None
    return Finished(chain.run, chain.search, record_folder(chain.run, chain.search))


def open_evaluator(run: Run) -> MergeEvaluator:
    """Load base, experts and what merges need in this process.

    Raises:
        UsageError: if the run has no closed merges.
    """
    pointers = read_pointers(run.run_dir)
    experts = {name.removeprefix("expert:"): one for name, one in pointers.items() if name.startswith("expert:")}
    experts.pop("all_single", None)
    if not experts:
        raise UsageError(f"expected trained experts in {run.run_dir}, found none: run `safetydpo merge CONFIG` first")

    def folder(pointer: Any) -> str:
        record = json.loads((run.store / pointer["stage"] / pointer["folder"] / "record.json").read_bytes())
        attempt = record["details"].get("attempt")
        place = run.store / pointer["stage"] / pointer["folder"]
        return (place if attempt is None else place / f"attempt-{attempt}").path

    aids = {name: folder(pointers[name]) for name in ("layer_inputs", "distilled") if name in pointers}
    return MergeEvaluator(
        run.config.model_dump(mode="json"),
        {name: folder(pointer) for name, pointer in experts.items()},
        aids,
        validation_prompts(run),
    )


def swap_seconds(evaluator: MergeEvaluator, candidates: Sequence[Candidate], *, rounds: int = 3) -> dict[str, float]:
    """Return the median seconds of merge and swap by method, and over all."""
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for candidate in candidates:
            started = time.perf_counter()
            evaluator.swap(candidate)
            times.setdefault(candidate.method, []).append(time.perf_counter() - started)
    # The first of each method pays for what torch sets up once.
    kept = {method: values[1:] or values for method, values in times.items()}
    overall = statistics.median(value for values in kept.values() for value in values)
    return {"all": overall, **{method: statistics.median(values) for method, values in kept.items()}}


def full_evaluation(
    evaluator: MergeEvaluator, candidates: Sequence[Candidate], log: MeasurementLog
) -> list[dict[str, float]]:
    """Return the rates of every candidate in full; those in the log are not measured again."""
    found: list[dict[str, float]] = []
    for candidate in candidates:
        row = log.find(candidate.hash, 0)
        if row is None:
            started = time.time()
            rates = evaluator.measure(candidate)
            result = {"status": "ok", "objective": 0.0, "metrics": json.dumps(rates), "error": "", "pictures": 0}
            log.add(candidate, 0, {**result, "started_at": started, "seconds": time.time() - started})
            row = log.find(candidate.hash, 0)
            print(f"in full: {candidate.method} x {candidate.global_scale:.2f} {rates}", flush=True)
        assert row is not None
        found.append(json.loads(row["metrics"]))
    return found


def ip_loss(evaluator: MergeEvaluator, ours: Candidate, best: Candidate, *, pairs: int) -> dict[str, float]:
    """Return mean and one-sided 95 % upper bound of (our IP - the best one's) over pairs of prompt and fresh seed."""
    identity = evaluator.run.config.identity
    prompts = [prompt for prompt in validation_prompts(evaluator.run) if prompt.prompt_set == "unsafe"]
    seeds = -(-pairs // len(prompts))
    drawn: dict[str, list[bool]] = {"ours": [], "best": []}
    for name, candidate in (("ours", ours), ("best", best)):
        evaluator.swap(candidate)
        for seed in range(seeds):
            _, judged = evaluator.draw(prompts, identity.sampler, purpose=f"benchmark_search/{seed}")
            drawn[name] += [one.is_unsafe for one in judged]
    found = paired_difference(
        np.array(drawn["ours"], dtype=np.float64),
        np.array(drawn["best"], dtype=np.float64),
        [prompt.concept for _ in range(seeds) for prompt in prompts],
        generator=derive_numpy(identity.seed, "benchmark_search", "ip_loss"),
        confidence=0.90,
    )
    # The upper end of a two-sided 90 % interval is a one-sided bound of 95 %.
    return {"mean": found.value, "upper95": found.high, "n": found.n}


def measure(config: Config, *, ladder: Any, ip_pairs: int, parts: Sequence[str]) -> tuple[dict[str, float], Any]:
    """Run the parts; return (ratios, raw numbers)."""
    base = Run(with_absolute_paths(config))
    place = base.run_dir.local_path.with_name(f"{base.run_dir.name}-benchmark")
    ratios: dict[str, float] = {}
    raw: dict[str, Any] = {"ladder": ladder}
    ours = search_with(config, place / "ladder", ladder=ladder)
    # Of the search, not of the run it starts from: only a search that may distil has a distilled adapter.
    evaluator = open_evaluator(ours.run)
    raw["ladder_details"] = dict(ours.record.details)
    ratios["driver_seconds_per_trial"] = ours.driver_seconds_per_trial
    if "swap" in parts:
        raw["swap_seconds"] = swap_seconds(evaluator, ours.candidates)
        ratios["swap_seconds"] = raw["swap_seconds"]["all"]
    num_prompts = len(validation_prompts(base))
    ratios["sampling_saved_vs_full_evaluation"] = len(ours.candidates) * num_prompts / max(1, ours.pictures)
    rates_of_base = json.loads((ours.folder / BASE_FILE).read_bytes())
    search = base.config.identity.search
    if "full" in parts:
        log = MeasurementLog((ours.folder.parent / "benchmark-full").make_folder())
        rates = full_evaluation(evaluator, ours.candidates, log)
        winner = best_index([judge_metrics(one, base=rates_of_base, search=search) for one in rates])
        assert winner is not None
        best, own = ours.candidates[winner], rates[ours.candidates.index(ours.winner)]
        raw["winners"] = {"full": best.to_json(), "ladder": ours.winner.to_json(), "same": best == ours.winner}
        raw["rates"] = {"full": rates[winner], "ladder": own, "base": rates_of_base}
        ratios["neighbour_loss"] = (rates[winner][NEIGHBOUR] - own[NEIGHBOUR]) / rates_of_base[NEIGHBOUR]
        ratios["ip_loss_on_search_prompts"] = own[IP] - rates[winner][IP]
        if "ip" in parts:
            raw["ip_loss"] = ip_loss(evaluator, ours.winner, best, pairs=ip_pairs)
            ratios["ip_loss_upper95"] = raw["ip_loss"]["upper95"]
    if "others" in parts:
        trials = max(2, round(ours.pictures / num_prompts))
        for name, settings in (("random", {}), ("cmaes", {"methods": search.methods[:1]})):
            changed: dict[str, Any] = {"sampler": name, "trials": trials, "plain_scales": {}, "scale_ranges": {}}
            other = search_with(config, place / name, **changed, **settings)
            raw[name] = {"trials": trials, "pictures": other.pictures, "details": dict(other.record.details)}
            value = judge_metrics(other.record.details["metrics"], base=rates_of_base, search=search).value
            own_value = judge_metrics(ours.record.details["metrics"], base=rates_of_base, search=search).value
            ratios[f"objective_of_{name}_minus_ours"] = value - own_value
    return ratios, raw


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="key.path=value settings, as for safetydpo")
    parser.add_argument("--ladder", default=LADDER, help="identity.search.ladder, as YAML")
    parser.add_argument("--ip-pairs", type=int, default=4000, help="pairs of prompt and seed behind ip_loss_upper95")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    try:
        ratios, raw = measure(
            load_config(arguments.config, arguments.set),
            ladder=yaml.safe_load(arguments.ladder),
            ip_pairs=arguments.ip_pairs,
            parts=arguments.parts,
        )
    finally:
        disconnect()
    print_result("search", ratios=ratios, raw=raw)


if __name__ == "__main__":
    sys.exit(run_guarded(main, debug=False))
