"""What single settings of training do on the demo world: one expert with and one without, over several seeds.

Usage: python -m benchmarks.training_ablations [CONFIG] [--seeds 0 1 2] [--page docs/training.md]

Needs the pairs of each seed: `safetydpo pairs configs/demo.yaml identity.seed=S run_dir=runs/ablations-S`. One unit is
one expert of one variant and seed; each is a JSON file in `--results` that names the commit it was measured at, a unit
that stands there is not measured again, and so a measurement may be interrupted at any time. Training is the plain
loop in this process on one thread. Pictures are of validation prompts, drawn with the expert alone and judged by
`select`, the judge that also chose the pairs. `own` are unsafe prompts of the expert's category, all of them for
`all_single`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.expert_bench import ExpertBench, validation_prompts
from benchmarks.harness import print_result
from ray_jobs.expert_plan import ExpertUnit
from ray_jobs.failures import run_guarded
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.load import load_config
from safetydpo.errors import SafetyDPOError
from safetydpo.prompts.sets import Prompt
from safetydpo.seeding import derive_numpy
from safetydpo.statistics import clopper_pearson

EXPERTS = ("hate", "sexual", "violence")
BEGIN, END = "<!-- ablations:begin -->", "<!-- ablations:end -->"
COLUMNS = {
    "own_ip": "IP",
    "own_safe_and_intact": "safe and intact",
    "own_unrecognisable": "unrecognisable",
    "others_ip": "IP of other categories",
    "neutral": "neutral concepts found",
    "neighbour": "neighbours found",
}


@dataclass(frozen=True)
class Variant:
    """One change to the config's training."""

    experts: Sequence[str] = EXPERTS
    dpo: Mapping[str, Any] = field(default_factory=dict)
    pair_share: float = 1.0
    """Share of the expert's pairs that it is trained on, drawn with the run's seed."""
    step_factor: int = 1
    """Optimizer steps as a multiple of the config's `dpo.steps`."""
    rank_factor: int = 1
    """Rank as a multiple of the config's `lora.rank`."""
    rate_divisor: int = 1
    """What the config's `dpo.learning_rate` is divided by."""


VARIANTS: Mapping[str, Variant] = {
    "as configured": Variant(),
    "captions: safe, which leaves nothing to redirect": Variant(dpo={"captions": "safe", "redirection_weight": 0.0}),
    "captions: both": Variant(dpo={"captions": "both"}),
    "50 % of the pairs": Variant(pair_share=0.5),
    "25 % of the pairs": Variant(pair_share=0.25),
    "no benign retention": Variant(dpo={"retention_weight": 0.0}),
    "winner preservation 0.5": Variant(dpo={"winner_preservation": 0.5}),
    "winner preservation 0.5, no price of a rise": Variant(dpo={"winner_preservation": 0.5, "safe_rise_weight": 0.0}),
    "all_single, steps of one expert": Variant(experts=(ALL_SINGLE,)),
    "all_single, 7 x the steps": Variant(experts=(ALL_SINGLE,), step_factor=7),
    "all_single, 7 x the rank": Variant(experts=(ALL_SINGLE,), rank_factor=7),
    "all_single, 7 x steps and rank": Variant(experts=(ALL_SINGLE,), step_factor=7, rank_factor=7),
    # Adam moves every component alike, so that a step moves the sum of 7 x as many of them 7 x as far.
    "all_single, 7 x the rank, rate / 7": Variant(experts=(ALL_SINGLE,), rank_factor=7, rate_divisor=7),
    "all_single, 7 x steps and rank, rate / 7": Variant(
        experts=(ALL_SINGLE,), step_factor=7, rank_factor=7, rate_divisor=7
    ),
}


def changed(unit: ExpertUnit, variant: Variant, *, steps: int, seed: int) -> ExpertUnit:
    """Return the unit as the variant trains it; `steps` are those of one expert."""
    rate = unit.dpo.learning_rate / variant.rate_divisor
    dpo = unit.dpo.model_copy(update={**variant.dpo, "steps": steps * variant.step_factor, "learning_rate": rate})
    num_pairs = max(1, round(len(unit.pair_ids) * variant.pair_share))
    order = derive_numpy(seed, "ablation_pairs", unit.name).permutation(len(unit.pair_ids))
    pair_ids = tuple(sorted(unit.pair_ids[place] for place in order[:num_pairs]))
    return replace(unit, dpo=dpo, pair_ids=pair_ids)


def measure_unit(bench: ExpertBench, prompts: Sequence[Prompt], *, name: str, expert: str) -> dict[str, Any]:
    """Train one expert of one variant and count what it draws."""
    variant, identity = VARIANTS[name], bench.run.config.identity
    unit = changed(bench.units[expert], variant, steps=identity.dpo.steps, seed=identity.seed)
    lora = identity.lora.model_copy(update={"rank": identity.lora.rank * variant.rank_factor})
    started = time.process_time()
    diverged = ""
    try:
        bench.train(unit, lora=lora)
    except SafetyDPOError as error:
        # A result as any other: the spike guard ended the training.
        diverged = " ".join(str(error).split())
    seconds = time.process_time() - started
    return {
        "variant": name,
        "expert": expert,
        "seed": identity.seed,
        "counts": {} if diverged else bench.counts(prompts, expert),
        "diverged": diverged,
        "pairs": len(unit.pair_ids),
        "steps": unit.dpo.steps,
        "rank": lora.rank,
        "training_cpu_seconds": round(seconds, 1),
        "commit": _commit(),
    }


def measure(config_file: Path, *, overrides: Sequence[str], seed: int, variants: Sequence[str], results: Path) -> None:
    """Measure what is missing of one seed."""
    missing = [
        (name, expert)
        for name in variants
        for expert in VARIANTS[name].experts
        if not _file(results, name, expert, seed).is_file()
    ]
    if not missing:
        return
    run_dir = f"execution.run_dir=runs/ablations-{seed}"
    bench = ExpertBench(load_config(config_file, [*overrides, f"identity.seed={seed}", run_dir]))
    prompts = validation_prompts(bench.run)
    for name, expert in missing:
        unit = measure_unit(bench, prompts, name=name, expert=expert)
        results.mkdir(parents=True, exist_ok=True)
        _file(results, name, expert, seed).write_text(json.dumps(unit, indent=1, sort_keys=True) + "\n")
        shares = {column: round(hits / n, 2) for column, (hits, n) in unit["counts"].items()} or unit["diverged"]
        print(f"{name:34} {expert:12} seed {seed} {shares} {unit['training_cpu_seconds']} s", flush=True)


def read_units(results: Path) -> Iterator[dict[str, Any]]:
    """Yield all measured units."""
    for file in sorted(results.glob("*.json")):
        yield json.loads(file.read_text())


def table(units: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown: a row per variant, counts of all experts and seeds pooled, exact 95 % intervals."""
    lines = [
        "| variant | " + " | ".join(COLUMNS.values()) + " | IP of each seed | n | CPU seconds of training |",
        "|---|" + "---|" * (len(COLUMNS) + 3),
    ]
    for name in VARIANTS:
        everyone = [unit for unit in units if unit["variant"] == name]
        if not everyone:
            continue
        mine = [unit for unit in everyone if unit["counts"]]
        label = (
            name if len(mine) == len(everyone) else f"{name} ({len(everyone) - len(mine)} of {len(everyone)} diverged)"
        )
        if not mine:
            lines.append(f"| {label} |" + " – |" * (len(COLUMNS) + 3))
            continue
        cells = [_interval([unit["counts"].get(column) for unit in mine]) for column in COLUMNS]
        seeds = sorted({unit["seed"] for unit in mine})
        per_seed = ", ".join(
            f"{_pooled([unit['counts']['own_ip'] for unit in mine if unit['seed'] == seed])[2]:.2f}" for seed in seeds
        )
        seconds = sum(unit["training_cpu_seconds"] for unit in mine) / len(mine)
        n = sum(unit["counts"]["own_ip"][1] for unit in mine)
        lines.append(f"| {label} | {' | '.join(cells)} | {per_seed} | {n} | {seconds:.0f} |")
    return "\n".join(lines)


def _pooled(counts: Sequence[Sequence[int]]) -> tuple[int, int, float]:
    hits, n = sum(hits for hits, _ in counts), sum(n for _, n in counts)
    return hits, n, hits / n


def _interval(counts: Sequence[Sequence[int] | None]) -> str:
    there = [one for one in counts if one is not None]
    if not there:
        return "–"
    hits, n, _ = _pooled(there)
    found = clopper_pearson(hits, n)
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _file(results: Path, name: str, expert: str, seed: int) -> Path:
    slug = "".join(letter if letter.isalnum() else "-" for letter in name.replace("%", "percent")).strip("-")
    return results / f"{slug}-{expert}-seed{seed}.json"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Read the arguments, measure, print, write the page's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--set", nargs="*", default=[], help="key.path=value settings, as for safetydpo")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--results", type=Path, default=Path("docs/results/training"))
    parser.add_argument("--page", type=Path, help="Markdown page whose marked part becomes the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        measure(
            arguments.config,
            overrides=arguments.set,
            seed=seed,
            variants=arguments.variants,
            results=arguments.results,
        )
    units = list(read_units(arguments.results))
    text = table(units)
    print(text)
    if arguments.page is not None:
        page = arguments.page.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        arguments.page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    first = _pooled([unit["counts"]["own_ip"] for unit in units if unit["variant"] == "as configured"])[2]
    ratios = {
        f"IP, {name} minus as configured": _pooled(
            [unit["counts"]["own_ip"] for unit in units if unit["variant"] == name and unit["counts"]]
        )[2]
        - first
        for name in arguments.variants
        if any(unit["variant"] == name and unit["counts"] for unit in units)
    }
    print_result("training_ablations", ratios=ratios, raw={"units": len(units), "seeds": arguments.seeds})


if __name__ == "__main__":
    sys.exit(run_guarded(main, debug=False))
