"""What each way of merging keeps and loses: merge the experts of a finished run, look at validation pictures.

Usage: python -m benchmarks.merge_methods [CONFIG] [--set key.path=value …]

Needs the closed search of the config's run (`safetydpo search CONFIG`): its experts and what its methods need beside
them. Draws the search's own validation prompts with every method of the search at several scales and judges them with
`select`, the judge that also chose the pairs and drives the search: good for comparing merges, no measurement of the
result (that is `safetydpo evaluate`, by the other judge on test prompts).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness import print_result
from ray_jobs.failures import run_guarded
from ray_jobs.merge_evaluator import MergeEvaluator
from ray_jobs.run import Run, with_absolute_paths
from ray_jobs.search_merges import validation_prompts
from safetydpo.artifacts.records import read_pointers
from safetydpo.config.load import load_config
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError
from safetydpo.merging.registry import find_method
from safetydpo.search.space import Candidate

SCALES: Mapping[str, Sequence[float]] = {
    "sum": (0.4, 0.6, 0.8, 1.0),
    "ties": (1.0, 1.5, 2.0),
    "co_merge": (1.0, 2.5),
    "regmean": (1.0, 1.3, 1.6),
    "distill": (0.7, 0.8, 0.9, 1.0, 1.1),
}
DENSITY = 0.3
COLUMNS = ("ip_select", "unrecognisable_rate", "neutral_rate", "neighbour_retention")


def measure(config: Config) -> dict[str, dict[str, float]]:
    """Return {method x scale: rates}; print a row for each."""
    run = Run(with_absolute_paths(config))
    pointers = read_pointers(run.run_dir)
    categories = run.config.identity.prompts.categories
    methods = [find_method(name) for name in run.config.identity.search.methods if name in SCALES]
    aids = [("layer_inputs", "needs_base"), ("distilled", "needs_distilled")]
    needed = [name for name, need in aids if any(getattr(method, need) for method in methods)]
    wanted = [*(f"expert:{name}" for name in categories), *needed]
    missing = [name for name in wanted if name not in pointers]
    if missing:
        raise UsageError(
            f"expected a finished search in {run.run_dir}, found no {missing[0]}: run `safetydpo search CONFIG` first"
        )

    def folder(name: str) -> str:
        return (run.store / pointers[name]["stage"] / pointers[name]["folder"]).path

    evaluator = MergeEvaluator(
        run.config.model_dump(mode="json"),
        {name: folder(f"expert:{name}") for name in categories},
        {name: folder(name) for name in needed},
        validation_prompts(run),
    )
    weights = tuple((name, 1.0) for name in sorted(categories))
    found = {}
    for method in (one.name for one in methods):
        for scale in SCALES[method]:
            started = time.perf_counter()
            rates = evaluator.measure(Candidate(method, scale, weights, DENSITY if method == "ties" else None))
            found[f"{method} x {scale:g}"] = rates | {"seconds": time.perf_counter() - started}
            print(f"{method} x {scale:g}".ljust(18), *(f"{name} {rates[name]:.2f}" for name in COLUMNS), flush=True)
    return found


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--set", nargs="*", default=[], help="key.path=value settings, as for safetydpo")
    arguments = parser.parse_args()
    raw = measure(load_config(arguments.config, arguments.set))
    floors = {name: rates for name, rates in raw.items() if rates["neutral_rate"] >= 0.9}
    best = {
        method: min((rates["ip_select"] for name, rates in floors.items() if name.startswith(method)), default=1.0)
        for method in dict.fromkeys(name.split(" x ")[0] for name in raw)
    }
    # A method that never keeps 0.9 counts as IP 1; one without a single hit must not divide by nothing.
    last = list(best)[-1]
    ratios = {
        f"least IP at neutral rate >= 0.9, {last} / {name}": best[last] / max(best[name], 1e-3)
        for name in best
        if name != last
    }
    print_result("merge_methods", ratios=ratios, raw={"rates": raw})


if __name__ == "__main__":
    sys.exit(run_guarded(main, debug=False))
