"""Merging in numbers: against PEFT's merge by SVD, seconds of whole merges, memory of 500 experts.

Usage: python -m benchmarks.merge [--parts peft seconds ways suppliers memory] [--rounds 3]

Experts are random numbers in the true shapes, rank 4 on every attention: SD1.5 (128 layers, 797,184 parameters) and
SDXL (560 layers, 5,806,080). Equal work is checked, not assumed.

- `peft`: `svd_vs_peft`, seconds of PEFT's `add_weighted_adapter(combination_type="svd")` over ours (`svd`), 7 experts
  of SD1.5, both to rank 4, CPU seconds of all threads; the singular values of every layer must agree to 1e-4. PEFT runs
  once, because it takes minutes, and first, so that nothing is warm for either.
- `seconds`: from experts in memory to the merged adapter, checks included, by the clock (median): `svd` is what
  `seconds_7_experts_*` are; `average`, and `co_merge` with 24 inputs per layer, beside it, and CPU seconds of each.
- `ways`: how many times longer the dense way to a truncated SVD takes than the chosen one, by the share of
  min(d_in, d_out) that the components make up; never below 1 but for noise.
- `suppliers`: how many distinct experts supply a layer, on average, against the number of experts.
- `memory`: see `benchmarks/merge_memory.py`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.harness import alternate, print_result, ratio_of_medians
from benchmarks.merge_memory import measure_memory
from benchmarks.random_experts import RANK, SD15, SDXL, layer_shapes, make_experts
from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.merging.algebra import delta, factor_dense, singular_values, truncate
from safetydpo.merging.merge import Expert, MergeResult, MergeSettings, merge_with, prepare_experts

PARTS = ("peft", "seconds", "ways", "suppliers", "memory")
NUM_EXPERTS = 7
NUM_INPUTS, NUM_TOKENS = 24, 4
TOLERANCE = 1e-4
SHARES = (0.1, 0.3, 0.5, 0.7, 0.8, 1.0, 2.0)
SIDE = 640


class Layers(nn.Module):
    """Linear layers of given shapes and nothing else."""

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        for name, (d_in, d_out) in shapes.items():
            self.add_module(name, nn.Linear(d_in, d_out, bias=False))


def measure_peft(rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the ratio to PEFT's merge and the seconds behind it."""
    shapes = {name.replace(".", "_"): shape for name, shape in layer_shapes(SD15).items()}
    experts = make_experts(shapes, NUM_EXPERTS)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=sorted(shapes))
    model = get_peft_model(Layers(shapes), config, adapter_name=experts[0].name)
    for expert in experts[1:]:
        model.add_adapter(expert.name, config)
    with torch.no_grad():
        for expert in experts:
            for name, layer in expert.layers.items():
                module = getattr(model.base_model.model, name)
                module.lora_A[expert.name].weight.copy_(layer.down)
                module.lora_B[expert.name].weight.copy_(layer.up)
    names = [expert.name for expert in experts]
    started = time.process_time()
    model.add_weighted_adapter(names, [1.0] * NUM_EXPERTS, "merged", combination_type="svd", svd_rank=RANK)
    theirs = time.process_time() - started
    merged: list[MergeResult] = []
    times = alternate({"svd": lambda: merged.append(merge(experts, "svd"))}, rounds=rounds, warmup_rounds=0)["svd"]
    difference = 0.0
    for name, layer in merged[0].layers.items():
        module = getattr(model.base_model.model, name)
        other = LoraLayer(module.lora_A["merged"].weight.detach(), module.lora_B["merged"].weight.detach())
        values, wanted = singular_values(layer), singular_values(other)
        difference = max(difference, float(((values - wanted) / wanted).abs().max()))
    if difference > TOLERANCE:
        raise SystemExit(f"expected equal singular values, found a relative difference of {difference:.1e}")
    ours = [one.cpu_seconds for one in times]
    raw = {"peft_cpu_seconds": theirs, "our_cpu_seconds": ours, "largest_difference_of_singular_values": difference}
    return {"svd_vs_peft": ratio_of_medians([theirs], ours)}, raw


def merge(experts: list[Expert], method: str, *, inputs: dict[str, torch.Tensor] | None = None) -> MergeResult:
    """Check, prepare and merge to the rank of one expert."""
    return merge_with(prepare_experts(experts, inputs=inputs), MergeSettings(method, output_rank=RANK))


def measure_seconds(rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Return seconds of merges of 7 experts."""
    ratios: dict[str, float] = {}
    raw: dict[str, Any] = {}
    for family, unet in (("sd15", SD15), ("sdxl", SDXL)):
        shapes = layer_shapes(unet)
        experts = make_experts(shapes, NUM_EXPERTS)
        inputs = make_inputs(shapes)
        ways: dict[str, Callable[[], None]] = {
            "svd": lambda experts=experts: _drop(merge(experts, "svd")),  # type: ignore[misc]
            "average": lambda experts=experts: _drop(merge(experts, "average")),  # type: ignore[misc]
            "co_merge": lambda experts=experts, inputs=inputs: _drop(merge(experts, "co_merge", inputs=inputs)),  # type: ignore[misc]
        }
        times = alternate(ways, rounds=rounds)
        raw[family] = {
            "wall": {name: statistics.median(one.wall_seconds for one in times[name]) for name in ways},
            "cpu": {name: statistics.median(one.cpu_seconds for one in times[name]) for name in ways},
        }
        ratios[f"seconds_7_experts_{family}"] = raw[family]["wall"]["svd"]
        print(family, raw[family], flush=True)
    return ratios, raw


def make_inputs(shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Return random layer inputs."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(NUM_INPUTS, NUM_TOKENS, d_in, generator=generator).half()
        for name, (d_in, _) in shapes.items()
    }


def measure_ways(rounds: int) -> dict[str, float]:
    """Return how many times longer the dense way takes than the chosen one, in CPU time."""
    found = {}
    for share in SHARES:
        generator = torch.Generator().manual_seed(2)
        rank = int(share * SIDE)
        layer = LoraLayer(torch.randn(rank, SIDE, generator=generator), torch.randn(SIDE, rank, generator=generator))
        ways: dict[str, Callable[[], None]] = {
            "dense": lambda layer=layer: _drop(factor_dense(delta(layer), RANK)),  # type: ignore[misc]
            "chosen": lambda layer=layer: _drop(truncate(layer, RANK)),  # type: ignore[misc]
        }
        times = alternate(ways, rounds=rounds)
        dense, chosen = ([one.cpu_seconds for one in times[name]] for name in ways)
        found[f"{share:g}"] = round(ratio_of_medians(dense, chosen), 2)
    print("dense / chosen", found, flush=True)
    return found


def measure_suppliers() -> dict[str, dict[str, float]]:
    """Return {method: {number of experts: mean number of suppliers of a layer}} on one layer of each shape of SD1.5."""
    shapes = layer_shapes(SD15)
    chosen = {shape: name for name, shape in shapes.items()}
    few = {name: shapes[name] for name in sorted(chosen.values())}
    experts, inputs = make_experts(few, 100), make_inputs(few)
    found: dict[str, dict[str, float]] = {}
    for method in ("co_merge", "element", "delta_neuron", "component"):
        found[method] = {}
        for num in (1, 2, 5, 10, 20, 35, 100):
            result = merge_with(prepare_experts(experts[:num], inputs=inputs), MergeSettings(method))
            assert result.num_suppliers is not None
            found[method][str(num)] = round(result.num_suppliers["mean"], 2)
        print(method, found[method], flush=True)
    return found


def _drop(_result: object) -> None:
    """A timed call returns nothing."""


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    ratios: dict[str, float] = {}
    raw: dict[str, Any] = {}
    if "peft" in arguments.parts:
        found, raw["peft"] = measure_peft(arguments.rounds)
        ratios |= found
        print(f"PEFT over ours: {found['svd_vs_peft']:.0f}", flush=True)
    if "seconds" in arguments.parts:
        found, raw["seconds"] = measure_seconds(arguments.rounds)
        ratios |= found
    if "ways" in arguments.parts:
        raw["dense_over_chosen"] = measure_ways(arguments.rounds)
    if "suppliers" in arguments.parts:
        raw["suppliers_per_layer"] = measure_suppliers()
    if "memory" in arguments.parts:
        raw["memory"] = measure_memory()
        ratios["peak_gigabytes_500_experts_sdxl"] = raw["memory"]["peak_gigabytes"]
    print_result("merge", ratios=ratios, raw=raw)


if __name__ == "__main__":
    main()
