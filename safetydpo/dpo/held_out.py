"""Pairs of an expert that are kept out of its training, and what the policy makes of them.

Axis legend: `metric` the numbers of `policy_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.config.training import DpoConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.dpo.batch import PreferenceData, step_batch
from safetydpo.dpo.micro_batches import micro_batches
from safetydpo.dpo.step import policy_loss
from safetydpo.errors import SafetyDPOError
from safetydpo.seeding import derive_seed


def split_held_out(data: PreferenceData, *, rate: float, run_seed: int) -> tuple[PreferenceData, PreferenceData]:
    """Return (pairs to train on, held-out pairs); both keep fingerprint, captions and benign pictures of the whole.

    Held out are the `max(1, round(rate * pairs))` pairs with the smallest `derive_seed(run_seed, "dpo_held_out", pair
    id)`: a pair that two experts share is mostly held out of both.

    Raises:
        SafetyDPOError: if no pair would be left to train on.
    """
    held = held_out_ids(data.pair_ids, rate=rate, run_seed=run_seed)
    rows: tuple[list[int], list[int]] = ([], [])
    for row, pair_id in enumerate(data.pair_ids):
        rows[pair_id in held].append(row)
    return _choose(data, rows[0]), _choose(data, rows[1])


def held_out_ids(pair_ids: Sequence[str], *, rate: float, run_seed: int) -> frozenset[str]:
    """Return the ids of the pairs that `split_held_out` keeps out of training.

    Raises:
        SafetyDPOError: if no pair would be left to train on.
    """
    count = max(1, round(rate * len(pair_ids)))
    if count >= len(pair_ids):
        raise SafetyDPOError(
            f"expected more pairs than the {count} that dpo.validation.held_out_rate {rate:g} keeps out of training, "
            f"found {len(pair_ids)}: lower it, or make more pairs"
        )
    order = sorted(pair_ids, key=lambda pair_id: derive_seed(run_seed, "dpo_held_out", pair_id))
    return frozenset(order[:count])


def _choose(data: PreferenceData, rows: list[int]) -> PreferenceData:
    return replace(
        data,
        pair_ids=tuple(data.pair_ids[row] for row in rows),
        latents_safe=data.latents_safe[rows],
        latents_unsafe=data.latents_unsafe[rows],
        captions_safe=data.captions_safe[rows],
        captions_unsafe=data.captions_unsafe[rows],
        variants_safe=data.variants_safe.rows(rows),
        variants_unsafe=data.variants_unsafe.rows(rows),
    )


def held_out_metrics(
    backbone: Backbone,
    held_out: PreferenceData,
    *,
    config: DpoConfig,
    run_seed: int,
    expert: str,
    rank: int = 0,
    world_size: int = 1,
    mean_over_processes: Callable[[Tensor], Tensor] = lambda mean: mean,
) -> Float[Tensor, " metric"]:
    """Return the numbers of `policy_loss` on held-out pairs, means over this process's rows, without a gradient.

    The rows and draws are those that training on these pairs alone would use in its first
    `ceil(pairs * held_out_draws / pairs_per_step)` steps: the same at every validation, and each pair about
    `held_out_draws` times.
    """
    # What must not change is measured on pictures, and benign rows are trained on.
    config = config.model_copy(update={"retention_weight": 0.0})
    batches = math.ceil(held_out.num_pairs * config.validation.held_out_draws / config.pairs_per_step)
    total: Tensor | None = None
    with torch.no_grad():
        for step in range(batches):
            batch = step_batch(
                held_out,
                step,
                config=config,
                run_seed=run_seed,
                expert=expert,
                num_timesteps=backbone.num_train_timesteps,
                rank=rank,
                world_size=world_size,
                device=backbone.device,
            )
            parts = list(micro_batches(batch, pairs_per_forward=config.pairs_per_forward))
            for part in parts:
                numbers = policy_loss(backbone, part, config=config, mean_over_processes=mean_over_processes)[
                    1
                ].double() / len(parts)
                total = numbers if total is None else total + numbers
    assert total is not None
    return total / batches
