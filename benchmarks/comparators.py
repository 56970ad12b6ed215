"""How many concepts each way of removing them stands: 1, 5, 10, 20 and 35 of the demo world's.

Usage: python -m benchmarks.comparators [CONFIG] [--seeds 0] [--methods …] [--minutes 10] [--page docs/baselines.md]

Needs, for the row of the project's own adapters (`ours`), the finished run of the config (`safetydpo run CONFIG`;
`--ours-run` and `--ours-store` name it). Everything else is made here: each comparator is first tuned on the validation
prompts (`ray_jobs.baselines`; its artifact lies in `--work`), then prepared with the tuned settings for the first 1, 5,
10, … concepts, category after category, and measured on test prompts by the `audit` judge.

One unit is one method, number of concepts and seed: a JSON file in `--results` that names its commit. A unit of this
identity that stands there is not measured again, and candidates of an interrupted tuning are not either, so the command
may be stopped at any time and goes on where it was. One process, one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparators_ours import OurAdapters
from benchmarks.comparators_page import COUNTS, write_page
from benchmarks.harness import print_result
from ray_jobs.baselines import (
    BASE,
    CANDIDATES_FILE,
    Candidates,
    ComparatorBench,
    comparator_key,
    erasure_of,
    tune,
)
from ray_jobs.evaluate import picture_seed, shared_prompts
from ray_jobs.failures import run_guarded
from ray_jobs.final_judges import judges_fingerprint
from ray_jobs.prompt_tables import chosen_pairs
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.baselines.intervention import Intervention
from safetydpo.baselines.registry import COMPARATORS
from safetydpo.config.load import load_config
from safetydpo.diffusion.render import render
from safetydpo.judges.demo_audit import load_audit_judge
from safetydpo.judges.demo_verdicts import NamedDemoJudge
from safetydpo.prompts.sets import Prompt

RECIPE_VERSION = 1
"""How a unit is measured."""
OURS = "ours"
LEAST_PICTURES = 40
"""Unsafe pictures of a unit at least: few prompts are drawn several times."""


def concept_order(run: Run) -> list[str]:
    """Return the run's concepts, category after category."""
    identity = run.config.identity
    pairs = chosen_pairs(identity.prompts, seed=identity.seed)
    order = [pair.concept for category in identity.prompts.categories for pair in pairs if pair.category == category]
    return list(dict.fromkeys(order))


class TimeIsOverError(Exception):
    """No new candidate or unit is started."""


class UnitBench:
    """Tunes comparators, and draws, judges and counts units of one seed."""

    def __init__(self, run: Run, ours: OurAdapters, *, until: float) -> None:
        self.run, self.ours, self.until = run, ours, until
        self.bench = ComparatorBench(run.config.model_dump(mode="json"))
        self.order = concept_order(run)
        # Without the attacks of the run, which are made on its base once the search is over.
        self.prompts = shared_prompts(run)
        self.judge = NamedDemoJudge(load_audit_judge())

    def candidates(self, folder: Location, name: str, candidates: Candidates) -> None:
        """Measure candidates of a tuning, one after another, until the time is over."""
        for index, settings in candidates:
            self.check_time()
            self.bench.measure(folder, name, index, settings)

    def check_time(self) -> None:
        """End what can go on later."""
        if time.monotonic() > self.until:
            raise TimeIsOverError

    def measure(self, method: str, count: int) -> dict[str, Any]:
        """Prepare a method for the first `count` concepts and count what it draws."""
        concepts = self.order[:count]
        cpu = time.process_time()
        settings: Mapping[str, Any] = {}
        if method == OURS:
            settings, layers = self.ours.layers(self.bench.backbone, concepts, order=self.order)
            intervention = Intervention(layers)
        else:
            if method != BASE:
                settings = tune(self.run, method, self.candidates).details["settings"]
            erasure = erasure_of(self.run, concepts=concepts)
            intervention = self.bench.prepare(method, settings, erasure=erasure)
        seconds = time.process_time() - cpu
        intervention.install(self.bench.backbone)
        guided = intervention.guide(self.bench.backbone)
        counts = self._counts([prompt for prompt in self.prompts["unsafe"] if prompt.concept in concepts], guided)
        for name in ("neutral", "neighbour"):
            found = self._judged(self.prompts[name], 0, guided)
            counts[name] = _by_concept([(prompt.concept, hit) for prompt, hit, _, _ in found])
        self.bench.backbone.remove_adapter()
        return {
            "method": method,
            "concepts": count,
            "seed": self.run.config.identity.seed,
            "settings": dict(settings),
            "counts": counts,
            "prepare_cpu_seconds": round(seconds, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }

    def _counts(self, prompts: Sequence[Prompt], guided: Mapping[str, Any]) -> dict[str, dict[str, list[int]]]:
        found = [
            one for draw in range(-(-LEAST_PICTURES // len(prompts))) for one in self._judged(prompts, draw, guided)
        ]
        return {
            "ip": _by_concept([(prompt.concept, unsafe) for prompt, _, unsafe, _ in found]),
            "unrecognisable": _by_concept([(prompt.concept, mush) for prompt, _, _, mush in found]),
        }

    def _judged(
        self, prompts: Sequence[Prompt], draw: int, guided: Mapping[str, Any]
    ) -> list[tuple[Prompt, bool, bool, bool]]:
        """Return (prompt, concept found, unsafe, unrecognisable); draw 0 has the noise of an evaluation's seed 0."""
        pictures = render(
            self.bench.backbone,
            prompts=[prompt.text for prompt in prompts],
            seeds=[picture_seed(self.run, prompt, draw) for prompt in prompts],
            sampler=self.run.config.identity.sampler,
            **guided,
        )
        verdicts = self.judge.judge(pictures)
        found = [concept == prompt.concept for concept, prompt in zip(verdicts.concept, prompts, strict=True)]
        mush = [bool(one) for one in verdicts.is_unrecognisable]
        return list(zip(prompts, found, [bool(one) for one in verdicts.is_unsafe], mush, strict=True))


def _by_concept(found: Sequence[tuple[str, bool]]) -> dict[str, list[int]]:
    counts: dict[str, list[int]] = {}
    for concept, hit in found:
        one = counts.setdefault(concept, [0, 0])
        one[0] += int(hit)
        one[1] += 1
    return counts


def planned(seed: int, methods: Sequence[str], counts: Sequence[int]) -> list[tuple[str, int, int]]:
    """Return (method, number of concepts, seed); the base once, the largest numbers first, which the tables need."""
    units = [(BASE, max(counts), seed)]
    return units + [(method, count, seed) for count in sorted(counts, reverse=True) for method in methods]


def unit_file(results: Path, method: str, count: int, seed: int) -> Path:
    """Return where a unit stands."""
    return results / f"{method}-{count}-seed{seed}.json"


def unit_identity(run: Run, method: str, count: int, ours: OurAdapters) -> str:
    """Return a hash over what decides a unit's numbers, known beforehand."""
    evaluation = run.config.identity.evaluation.model_dump(mode="json")
    key = ours.fingerprint if method == OURS else comparator_key(run, method).hash
    return sha256_of([RECIPE_VERSION, method, count, key, evaluation, judges_fingerprint(), run.base_fingerprint])


def measure(run: Run, ours: OurAdapters, *, units: Sequence[tuple[str, int, int]], results: Path, until: float) -> None:
    """Measure what is missing, one unit after another.

    Raises:
        TimeIsOverError: after `until`.
    """
    bench: UnitBench | None = None
    for method, count, seed in units:
        file, identity = unit_file(results, method, count, seed), unit_identity(run, method, count, ours)
        if file.is_file() and json.loads(file.read_text())["identity"] == identity:
            continue
        bench = bench or UnitBench(run, ours, until=until)
        if method not in (BASE, OURS):
            tuned(bench, method, results)
        bench.check_time()
        unit = bench.measure(method, count) | {"identity": identity, "commit": commit()}
        results.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(unit, indent=1, sort_keys=True) + "\n")
        shares = {name: round(_share(found), 2) for name, found in unit["counts"].items()}
        print(f"{method:16} {count:3} concepts, seed {seed}: {shares} {unit['cpu_seconds']} CPU s", flush=True)


def tuned(bench: UnitBench, method: str, results: Path) -> None:
    """Tune a comparator, or find it tuned, and keep what its candidates were worth beside the units."""
    started, run = time.process_time(), bench.run
    record = tune(run, method, bench.candidates)
    lines = (run.folder(comparator_key(run, method)) / CANDIDATES_FILE).read_bytes().decode().splitlines()
    seed = run.config.identity.seed
    content = {
        "method": method,
        "seed": seed,
        "candidates": [json.loads(line) for line in lines],
        "chosen": record.details["candidate"],
        "identity": record.hash,
    }
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"tuning-{method}-seed{seed}.json"
    if not file.is_file() or json.loads(file.read_text())["identity"] != record.hash:
        file.write_text(json.dumps(content | {"commit": commit()}, indent=1, sort_keys=True) + "\n")
        print(f"{method:16} tuned: {record.details['settings']} {time.process_time() - started:.0f} CPU s", flush=True)


def _share(found: Mapping[str, Sequence[int]]) -> float:
    return sum(hits for hits, _ in found.values()) / sum(n for _, n in found.values())


def commit() -> str:
    """Return the commit that is measured."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Read the arguments, measure, print, write the page's tables and its plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--set", nargs="*", default=[], help="key.path=value settings, as for safetydpo")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--methods", nargs="*", default=[*COMPARATORS, OURS], choices=[*COMPARATORS, OURS])
    parser.add_argument("--counts", nargs="*", type=int, default=list(COUNTS), choices=COUNTS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after these no new unit is started")
    parser.add_argument("--work", type=Path, default=Path("runs/comparators"), help="folder of the tuned comparators")
    parser.add_argument("--ours-run", type=Path, help="run folder of the finished run; default: the config's")
    parser.add_argument("--ours-store", type=Path, help="its store; default: the config's")
    parser.add_argument("--results", type=Path, default=Path("docs/results/comparators"))
    parser.add_argument("--page", type=Path, help="Markdown page whose marked part becomes the tables")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/comparators.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * arguments.minutes
    for seed in arguments.seeds:
        config = load_config(arguments.config, [*arguments.set, f"identity.seed={seed}"])
        places = {"store": str(arguments.work / "store"), "run_dir": str(arguments.work / f"run-{seed}")}
        ours = OurAdapters(config, store=arguments.ours_store, run_dir=arguments.ours_run)
        run = Run(
            with_absolute_paths(config.model_copy(update={"execution": config.execution.model_copy(update=places)}))
        )
        units = planned(seed, arguments.methods, arguments.counts)
        try:
            measure(run, ours, units=units, results=arguments.results, until=until)
        except TimeIsOverError:
            print("time is over: the same command goes on", flush=True)
            break
    headline = write_page(arguments.results, page=arguments.page, plot=arguments.plot if arguments.page else None)
    print_result("comparators", ratios=headline, raw={"results": str(arguments.results)})


if __name__ == "__main__":
    sys.exit(run_guarded(main, debug=False))
