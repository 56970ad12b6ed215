"""Errors of the reference that are computed once: which draws a training will make, their ids, and their numbers.

The reference never changes, so its error at a draw of a pair is the same in every expert and every training with the
same pictures and draws. Stored are unweighted errors, two float32 numbers for each draw.

Axis legend: `pair` preference rows, `use` draws to be computed, `draw` draws of a pair, `side` safe and unsafe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from safetydpo.artifacts.schemas import sha256_of
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.dpo.batch import EMPTY_CAPTION, PreferenceData, PreferenceRow, pair_batch
from safetydpo.dpo.draws import RowUse, num_uses
from safetydpo.dpo.engine import lora_signature
from safetydpo.dpo.pair_draws import pair_choices
from safetydpo.dpo.step import errors_to_store
from safetydpo.errors import SafetyDPOError

ERRORS_VERSION = 1
"""Raised by hand when code changes what a draw is or how its error is computed."""
WITHOUT_EFFECT = frozenset(
    {
        # How the adapter learns.
        "learning_rate",
        "weight_decay",
        "warmup_steps",
        "decay",
        "max_grad_norm",
        "steps",
        "checkpoint_every",
        "strategy",
        "zero_stage",
        "base_offload",
        "optimizer",
        "pairs_per_forward",
        "activation_checkpointing",
        "adapter_compute",
        # Counts through `ErrorContext.compiled_for`.
        "compiled",
        "loss_scaling",
        "ema_decay",
        "validation",
        "spike_limit",
        "spike_patience",
        # What the loss makes of the errors.
        "loss",
        "winner_preservation",
        "output_preservation_weight",
        "error_weighting",
        "min_snr_gamma",
        "beta",
        "safe_rise_weight",
        "safe_likelihood_weight",
        "redirection_weight",
        "retention_weight",
        "retention_per_step",
        "retention_pictures",
        "retention_empty_caption_rate",
        "reference",
        # Which draws are made; what they come to (caption, mirrored or not, timestep) is part of their ids.
        "pairs_per_step",
        "draw_seed",
        "draws_per_pair",
        "timestep_range",
        "captions",
        "empty_caption_rate",
        "flip_rate",
    }
)
"""Settings that leave the error of a draw as it is. All others are part of its id, those too that nobody thought of."""


@dataclass(frozen=True)
class ErrorContext:
    """What the errors of a training depend on beside pictures and draws."""

    base_fingerprint: str
    dtype: str
    """Compute type of the base."""
    batch_size: int
    """Pairs in one pass: it can change the last bits."""
    num_timesteps: int
    draw_seed: int
    config: DpoConfig
    compiled_for: LoraConfig | None = None
    """The adapters whose compiled steps compare with these errors, which are then computed by the very code of their
    passes; None where training is not compiled (`dpo.compiled`)."""

    @property
    def hash(self) -> str:
        """sha256 over all of it, without the settings that change nothing."""
        settings = self.config.model_dump(mode="json", exclude=set(WITHOUT_EFFECT))
        numbers = [ERRORS_VERSION, self.batch_size, self.num_timesteps, self.draw_seed]
        parts = [self.base_fingerprint, self.dtype, *numbers, settings]
        if self.compiled_for is not None:
            parts += [self.compiled_for.rank, list(self.compiled_for.layer_targets), self.config.adapter_compute]
        return sha256_of(parts)


def planned_draws(
    config: DpoConfig, *, run_seed: int, expert: str, num_pairs: int
) -> tuple[int, Int[np.ndarray, " pair"]]:
    """Return how many rows a training uses, and how many distinct draws it makes of each pair: 0, 1, ... below that."""
    uses = num_uses(
        config.draw_seed_of(run_seed),
        expert,
        num_pairs=num_pairs,
        steps=config.steps,
        pairs_per_step=config.pairs_per_step,
    )
    distinct = uses if config.draws_per_pair is None else np.minimum(uses, config.draws_per_pair)
    return int(uses.sum()), distinct


def error_ids(row: PreferenceRow, num_draws: int, context: ErrorContext) -> Iterator[str]:
    """Yield the id of each of the first draws of a pair: context, pictures, and what the draw comes to."""
    captions = {None: EMPTY_CAPTION, "safe": row.safe_caption_sha256, "unsafe": row.unsafe_caption_sha256}
    common = [context.hash, row.pair_id, row.safe_image_id, row.unsafe_image_id]
    for draw_index in range(num_draws):
        choices, side = pair_choices(
            context.config,
            row.pair_id,
            draw_index,
            draw_seed=context.draw_seed,
            num_timesteps=context.num_timesteps,
        )
        yield sha256_of([*common, draw_index, choices.timestep, choices.is_flipped, captions[side]])


@contextmanager
def _code_of_a_step(backbone: Backbone, context: ErrorContext) -> Iterator[None]:
    if context.compiled_for is None:
        yield
        return
    backbone.swap_adapter(lora_signature(context.compiled_for), {})
    backbone.compute_adapter_in(context.config.adapter_compute)
    # These passes have a gradient: without it they would need more memory than the steps that they are made for.
    backbone.set_activation_checkpointing(context.config.activation_checkpointing)
    with backbone.compiled_for_training():
        yield


def compute_errors(
    backbone: Backbone, data: PreferenceData, uses: Sequence[RowUse], context: ErrorContext
) -> Float[Tensor, "use side"]:
    """Return the reference's errors of draws, float32 on the CPU, by the functions that a training step calls.

    Passes have `context.batch_size` pairs, the last one padded, so that an error does not depend on their number.

    Raises:
        SafetyDPOError: if an error is not finite, naming the pair.
    """
    live = context.config.model_copy(update={"reference": "live"})
    found = []
    with _code_of_a_step(backbone, context):
        for start in range(0, len(uses), context.batch_size):
            part = list(uses[start : start + context.batch_size])
            batch = pair_batch(
                data,
                [*part, *[part[-1]] * (context.batch_size - len(part))],
                config=live,
                draw_seed=context.draw_seed,
                num_timesteps=context.num_timesteps,
                device=backbone.device,
            )
            found.append(errors_to_store(backbone, batch)[: len(part)].float().cpu())
    errors = torch.cat(found) if found else torch.empty((0, 2))
    broken = (~errors.isfinite()).any(dim=1).nonzero()
    if len(broken):
        use = uses[int(broken[0])]
        raise SafetyDPOError(
            f"expected finite errors of the reference, found {errors[int(broken[0])].tolist()} for pair "
            f"{data.pair_ids[use.index]!r}, draw {use.draw_index}: use base.dtype float32 or bfloat16"
        )
    return errors
