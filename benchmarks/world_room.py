"""How much room the demo world leaves above one adapter trained on everything: by its concepts, steps and rank.

Usage: python -m benchmarks.world_room [CONFIG] [--settings all "1 concept per category"]

Needs the closed `pairs` of the config's run (`safetydpo pairs CONFIG`). Trains `all_single` with the config's settings
and with changed ones, draws validation prompts and judges them with `select`, the judge that also chose the pairs.
`own_*` are over prompts of the concepts that it was trained on, `untrained_ip` over the other concepts of the training
split. A world of k times as many concepts leaves each of them a k-th of the steps and of the rank.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.expert_bench import ExpertBench, validation_prompts
from benchmarks.harness import print_result
from ray_jobs.failures import run_guarded
from safetydpo.artifacts.schemas import MEMBERSHIPS
from safetydpo.artifacts.tables import read_table
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.load import load_config
from safetydpo.config.schema import Config

SETTINGS: Mapping[str, tuple[int | None, float, float]] = {
    "all": (None, 1, 1),
    "1 concept per category": (1, 1, 1),
    "3 concepts per category": (3, 1, 1),
    "1/2 of the steps": (None, 2, 1),
    "1/4 of the steps": (None, 4, 1),
    "1/8 of the steps": (None, 8, 1),
    "1/16 of the steps": (None, 16, 1),
    "1/4 of the rank": (None, 1, 4),
    "1/16 of the rank": (None, 1, 16),
    "1/4 of both": (None, 4, 4),
}
"""Concepts per category (None = all), and what steps and rank are divided by."""


def measure(config: Config, settings: Sequence[str], *, per_category: int) -> dict[str, dict[str, float]]:
    """Return {setting: rates}; print a row for each."""
    bench = ExpertBench(config)
    whole = bench.units[ALL_SINGLE]
    prompts = validation_prompts(bench.run, per_category=per_category)
    concept_of, concepts = _concepts(bench)
    found: dict[str, dict[str, float]] = {}
    for setting in settings:
        count, fewer_steps, lower_rank = SETTINGS[setting]
        chosen = {concept for members in concepts.values() for concept in members[:count]}
        lora = bench.run.config.identity.lora
        lora = lora.model_copy(update={"rank": max(1, round(lora.rank / lower_rank))})
        steps = max(1, round(whole.dpo.steps / fewer_steps))
        dpo = whole.dpo.model_copy(update={"steps": steps, "warmup_steps": min(whole.dpo.warmup_steps, steps // 4)})
        pairs = tuple(pair_id for pair_id in whole.pair_ids if concept_of[pair_id] in chosen)
        started = time.perf_counter()
        bench.train(replace(whole, dpo=dpo, pair_ids=pairs), lora=lora)
        seconds = time.perf_counter() - started
        trained = [prompt for prompt in prompts if prompt.prompt_set != "unsafe" or prompt.concept in chosen]
        rates = bench.rates(trained, ALL_SINGLE) | {"pairs": len(pairs), "seconds": seconds}
        if rest := [prompt for prompt in prompts if prompt not in trained]:
            rates["untrained_ip"] = bench.rates(rest, ALL_SINGLE)["own_ip"]
        found[setting] = rates
        print(f"{setting:28}", {name: round(value, 3) for name, value in found[setting].items()}, flush=True)
    return found


def _concepts(bench: ExpertBench) -> tuple[dict[str, str], dict[str, list[str]]]:
    concept_of: dict[str, str] = {}
    concepts: dict[str, set[str]] = defaultdict(set)
    for row in read_table(bench.pairs_folder / "memberships.parquet", MEMBERSHIPS).to_pylist():
        concept_of[row["pair_id"]] = row["concept"]
    # A concept of two categories is counted under its first, as its prompts are.
    for prompt in validation_prompts(bench.run, per_category=1000):
        if prompt.prompt_set == "unsafe":
            concepts[prompt.category].add(prompt.concept)
    return concept_of, {category: sorted(members) for category, members in concepts.items()}


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/evidence.yaml"))
    parser.add_argument("--set", nargs="*", default=[], help="key.path=value settings, as for safetydpo")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--per-category", type=int, default=28, help="unsafe validation prompts per category")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(arguments.config, arguments.set)
    raw = measure(config, arguments.settings, per_category=arguments.per_category)
    first = next(iter(raw.values()))
    ratios = {
        f"ip minus that of {arguments.settings[0]}: {name}": rates["own_ip"] - first["own_ip"]
        for name, rates in raw.items()
    }
    print_result("world_room", ratios=ratios, raw={"rates": raw})


if __name__ == "__main__":
    sys.exit(run_guarded(main, debug=False))
