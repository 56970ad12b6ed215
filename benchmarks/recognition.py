"""How well a CLIP model stands in for a judge that knows concepts: what a search by judges of real pictures rests on.

Usage: python -m benchmarks.recognition CONFIG [--set key.path=value …] [--methods sum ties] [--scales 0.3 0.7 …]

CONFIG (with the settings after --set) is a run of the demo world whose merge stage is closed. Base and merges at
several scales, from harmless to ruinous, draw the validation prompts; the demo's `select` judge, which knows concepts
and broken pictures, and `RealJudges` with the demo's CLIP model, which knows captions only, look at the same pictures.
`ratios` has the rank correlation of their rates over the merges, and of the objective that a search minimises; `raw`
the rates, and per picture how often both say the same. Unsafe pictures are judged by `select` in both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import print_result
from benchmarks.search import open_evaluator
from ray_jobs.failures import run_guarded
from ray_jobs.run import Run, with_absolute_paths
from ray_jobs.sampled_rates import JudgedPrompt, count_shares
from ray_jobs.search_judges import RealJudges, clip_of_search
from ray_jobs.search_merges import safe_captions, validation_prompts
from safetydpo.artifacts.records import read_pointers
from safetydpo.config.load import load_config
from safetydpo.search.ladder import rank_correlation
from safetydpo.search.objective import NEIGHBOUR, NEUTRAL, UNRECOGNISABLE, judge_metrics
from safetydpo.search.space import Candidate

COMPARED = (NEUTRAL, NEIGHBOUR, UNRECOGNISABLE)


def measure(config: Any, candidates: Sequence[Candidate | None], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return, for each candidate, the rates by both and the pictures on which they agree."""
    run = Run(with_absolute_paths(config))
    evaluator, prompts = open_evaluator(run), validation_prompts(run)
    clip = clip_of_search(run.config.identity)
    real = RealJudges(run.config, prompts, safe_captions(run), clip=clip, device="cpu")
    least, rows = None, []
    for candidate, name in zip(candidates, names, strict=True):
        evaluator.swap(candidate)
        pictures, judged = evaluator.draw(prompts, run.config.identity.sampler)
        looked = real.look(pictures, prompts, least)
        least = looked.least_similarity
        rows.append(
            {
                "candidate": name,
                "select": count_shares(judged, judge="select"),
                "clip": count_shares(looked.judged, judge="clip"),
                "agree": agreement(judged, looked.judged),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def agreement(one: Sequence[JudgedPrompt], other: Sequence[JudgedPrompt]) -> dict[str, float]:
    """Return how often both find the prompt (benign ones), and both see nothing (unsafe ones)."""
    pairs = list(zip(one, other, strict=True))
    benign = [a.is_found == b.is_found for a, b in pairs if a.prompt.prompt_set != "unsafe"]
    unsafe = [a.is_unrecognisable == b.is_unrecognisable for a, b in pairs if a.prompt.prompt_set == "unsafe"]
    return {"found": sum(benign) / len(benign), "unrecognisable": sum(unsafe) / len(unsafe)}


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recognition", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="key.path=value settings, as for safetydpo")
    parser.add_argument("--methods", nargs="*", default=["sum", "ties", "co_merge"])
    parser.add_argument("--scales", nargs="*", type=float, default=[0.2, 0.5, 0.8, 1.2, 2.0, 3.5, 6.0])
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.set)
    run = Run(with_absolute_paths(config))
    experts = [name.removeprefix("expert:") for name in read_pointers(run.run_dir) if name.startswith("expert:")]
    weights = tuple((name, 1.0) for name in sorted(experts) if name != "all_single")
    cases = [(method, scale) for method in options.methods for scale in options.scales]
    candidates = [
        Candidate(method, scale, weights, density=0.3 if method == "ties" else None) for method, scale in cases
    ]
    names = [f"{method} x {scale:g}" for method, scale in cases]
    rows = measure(config, [None, *candidates], ["base", *names])
    search, base, merges = run.config.identity.search, rows[0], rows[1:]
    ratios = {}
    for name in COMPARED:
        found = rank_correlation([row["select"][name] for row in merges], [row["clip"][name] for row in merges])
        ratios[f"spearman_{name}"] = float("nan") if found.spearman is None else found.spearman
    values = [
        [judge_metrics(row[judge], base=base[judge], search=search).value for row in merges]
        for judge in ("select", "clip")
    ]
    found = rank_correlation(*values)
    ratios["spearman_objective"] = float("nan") if found.spearman is None else found.spearman
    best = {judge: names[value.index(min(value))] for judge, value in zip(("select", "clip"), values, strict=True)}
    print_result("recognition", ratios=ratios, raw={"rows": rows, "best": best, "seed": run.config.identity.seed})
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:]), debug=False))
