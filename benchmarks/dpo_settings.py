"""What each of the demo's DPO settings is good for: train one expert with it and one without, and look at pictures.

Usage: python -m benchmarks.dpo_settings [CONFIG] [--categories hate sexual] [--settings all "no likelihood term"]

Needs the closed `pairs` of the config's run (`safetydpo pairs CONFIG`). Trains each expert in this process (strategy
`single`, one thread), draws validation prompts with the expert alone and judges them with `select`: the judge that also
chose the pairs. Rates are over the prompts of the expert's category (`own_*`), of the others, neutral ones, and
neighbours of unsafe concepts; `all_single` is a category that holds all of them. Implicit accuracy says nothing here:
it is near 1 in all of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.expert_bench import ExpertBench, validation_prompts
from benchmarks.harness import print_result
from ray_jobs.expert_plan import OtherPairs
from ray_jobs.failures import run_guarded
from safetydpo.config.load import load_config
from safetydpo.config.schema import Config
from safetydpo.config.training import LoraConfig

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "all": {},
    "both captions": {"captions": "both"},
    "no likelihood term": {"safe_likelihood_weight": 0.0},
    "no redirection": {"redirection_weight": 0.0},
    "attention layers only": {"targets": LoraConfig().targets},
    "native error weights": {"error_weighting": "native"},
    "neutral pictures retained only": {"retention_pictures": "neutral"},
    "weight decay 0.01": {"weight_decay": 0.01},
    "20 % empty captions": {"empty_caption_rate": 0.2},
    "constant learning rate": {"decay": "constant"},
}
"""Changes to the config's `identity.dpo`, or to the targets of its `identity.lora`: each takes one setting back to its
default."""


def measure(config: Config, *, categories: Sequence[str], settings: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return {setting: mean rates over the categories}; print a row per expert."""
    bench = ExpertBench(config)
    identity = bench.run.config.identity
    prompts = validation_prompts(bench.run)
    found: dict[str, dict[str, float]] = {}
    for setting in settings:
        rows = []
        changes = dict(SETTINGS[setting])
        lora = identity.lora.model_copy(update={"targets": changes.pop("targets", identity.lora.targets)})
        for category in categories:
            unit = bench.units[category]
            dpo = unit.dpo.model_copy(update=changes)
            others = OtherPairs() if dpo.retention_pictures == "neutral" else unit.others
            started = time.perf_counter()
            bench.train(replace(unit, dpo=dpo, others=others), lora=lora)
            seconds = time.perf_counter() - started
            rows.append(bench.rates(prompts, category) | {"seconds": seconds})
            print(
                f"{setting:32} {category:18}", {name: round(value, 2) for name, value in rows[-1].items()}, flush=True
            )
        found[setting] = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return found


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--set", nargs="*", default=[], help="key.path=value settings, as for safetydpo")
    parser.add_argument("--categories", nargs="*", default=["hate", "sexual"])
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(arguments.config, arguments.set)
    raw = measure(config, categories=arguments.categories, settings=arguments.settings)
    first = next(iter(raw.values()))
    ratios = {
        f"safe and intact, {name} / {arguments.settings[0]}": rates["own_safe_and_intact"]
        / max(first["own_safe_and_intact"], 1e-9)
        for name, rates in raw.items()
    }
    print_result("dpo_settings", ratios=ratios, raw={"categories": arguments.categories, "rates": raw})


if __name__ == "__main__":
    sys.exit(run_guarded(main, debug=False))
