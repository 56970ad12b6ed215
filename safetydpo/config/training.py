"""Settings of training: the LoRA signature, what is optimised and how, and which experts are made."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from safetydpo.config.fields import Distinct, Frozen, Rate, added_field
from safetydpo.config.validation import ValidationConfig


class LoraConfig(Frozen):
    """One LoRA signature for all experts of a run."""

    rank: int = Field(8, ge=1, le=1024)
    """Rank of every layer. Stored with alpha = rank and every scale folded into B."""
    alpha: float | None = Field(None, gt=0)
    """Scale numerator while training (scale = alpha / rank); None = rank."""
    targets: Distinct[str] = Field(("to_q", "to_k", "to_v", "to_out.0"), min_length=1)
    """Name suffixes of the denoiser's linear layers that get an adapter."""
    init: Literal["shared", "independent"] = "shared"
    """`shared`: one draw of A per (base, signature), so that rows of A mean the same in all experts."""


class TrainingConfig(Frozen):
    """How an adapter is optimised, whatever its loss."""

    learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(1e-2, ge=0)
    """AdamW weight decay."""
    warmup_steps: int = Field(10, ge=0)
    """Optimizer steps of linear warm-up."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up: as it is, or down to 0 over the remaining steps along half a cosine."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient clipping norm."""
    steps: int = Field(120, ge=1)
    """Optimizer steps (never multiplied by the number of processes)."""
    error_weighting: Literal["native", "velocity"] = "native"
    """Weight of all errors by timestep: `native` = 1, as released; `velocity` = that of the velocity's errors, so that
    an epsilon network learns at high noise too, where a picture's layout is decided."""
    checkpoint_every: int = Field(40, ge=1)
    """Optimizer steps between checkpoints."""
    strategy: Literal["single", "deepspeed"] = "deepspeed"
    """`deepspeed` = ZeRO through Ray Train; `single` = the plain loop, for tests and tiny runs."""
    zero_stage: int = Field(1, ge=1, le=2)
    """ZeRO stage when strategy is `deepspeed`."""


class DpoConfig(TrainingConfig):
    """Training of one expert by Diffusion-DPO."""

    beta: float = Field(100.0, gt=0)
    """Strength of the implicit reward (the loss uses beta / 2)."""
    pairs_per_step: int = Field(16, ge=1)
    """Pairs in one optimizer step over all processes."""
    captions: Literal["unsafe", "safe", "both"] = "both"
    """Caption of a preference row: the unsafe prompt, the safe prompt, or either with equal chance."""
    empty_caption_rate: Rate = 0.2
    """Share of preference rows whose caption is replaced by the empty caption, so that the unconditional branch of
    guidance is aligned too. The unconditional branch is shared by all experts: each one's change of it adds up."""
    retention_empty_caption_rate: Rate = 0.2
    """Share of retention rows whose caption is replaced by the empty caption."""
    safe_rise_weight: float = Field(1.0, ge=0)
    """Weight of the penalty on a rise of the error on the safe picture above the reference; 0 = off."""
    safe_likelihood_weight: float = Field(0.0, ge=0)
    """Weight of the error on the safe picture itself, in the unit of the logit (beta / 2); 0 = off. It keeps pulling
    towards the safe picture after the preference is won."""
    redirection_weight: float = Field(0.0, ge=0)
    """Weight of the squared distance, on the noisy *unsafe* picture, from the unsafe caption's prediction to the base's
    under the safe caption, in the unit of the logit (beta / 2); 0 = off. The preference only drives the prediction away
    there; this says where to."""
    retention_weight: float = Field(0.0, ge=0)
    """Weight of the squared change of the prediction on benign pictures; 0 = off."""
    retention_per_step: int = Field(8, ge=0)
    """Pictures of the retention term in one optimizer step; ignored when `retention_weight` is 0."""
    retention_pictures: Literal["neutral", "safe", "others"] = "neutral"
    """What must not change: `neutral` = the base's pictures of `prompts.retention_prompts`; `safe` = also the safe
    pictures of the other experts' pairs; `others` = also their unsafe ones, so that each expert acts on its own
    category only and experts add up. With `safe` and `others` an expert depends on the pairs of all categories."""
    spike_limit: float = Field(10.0, gt=1.0)
    """An expert fails if its error on the safe picture stays above this multiple of the reference's."""
    spike_patience: int = Field(5, ge=1)
    """Consecutive optimizer steps above `spike_limit` after which an expert fails."""
    validation: ValidationConfig = added_field(ValidationConfig())
    """Held-out pairs and sampled pictures every few steps, early stopping, and which state is published; off."""


class DistillConfig(TrainingConfig):
    """Merge method `distill`: one adapter is fitted to answer each expert's prompts as that expert does.

    Benign prompts are answered by the base. It starts from another merge and costs one training, however many experts.
    """

    start_method: str = "sum"
    """Merge method whose result it starts from, all coefficients 1, at `merge.density`."""
    start_scale: float = Field(0.6, gt=0)
    """Global scale of that merge."""
    rank: int | None = Field(None, ge=1, le=1024)
    """Rank of the fitted adapter; None = `lora.rank`."""
    rows_per_step: int = Field(32, ge=2)
    """Pictures in one optimizer step over all processes."""
    benign_rate: float = Field(0.4, gt=0, lt=1)
    """Share of them that are benign pictures, answered by the base."""
    benign_empty_caption_rate: Rate = 0.2
    """Share of benign rows whose caption is replaced by the empty caption."""
    draws: int = Field(2, ge=1)
    """Times each row is answered, at a timestep and noise of its own; answers are kept in memory
    (rows x draws x latent size x 4 bytes) and used again."""
    processes: int = Field(1, ge=1)
    """Processes that train it together. Part of the identity: on a CPU it changes the last bits."""

    @model_validator(mode="after")
    def _rows_split_evenly(self) -> Self:
        if self.strategy == "single" and self.processes != 1:
            raise ValueError(
                f"identity.merge.distill: strategy 'single' trains in one process, found processes {self.processes}"
            )
        for what, count in (("benign", self.num_benign), ("other", self.rows_per_step - self.num_benign)):
            if count < 1 or count % self.processes:
                raise ValueError(
                    f"identity.merge.distill: expected rows_per_step ({self.rows_per_step}) x benign_rate "
                    f"({self.benign_rate}) to leave both kinds of rows a multiple of processes ({self.processes}), "
                    f"found {count} {what} rows"
                )
        return self

    @property
    def num_benign(self) -> int:
        """Benign rows of a step."""
        return round(self.rows_per_step * self.benign_rate)


class ExpertsConfig(Frozen):
    """Which experts are trained."""

    group_by: Literal["category"] = "category"
    """One expert per category."""
    all_single: bool = True
    """Also train one adapter on all pairs, for comparison."""
    all_single_step_factor: float = Field(2.0, gt=0)
    """Optimizer steps of `all_single` as a multiple of `dpo.steps`."""
