"""Settings of training: the LoRA signature, what is optimised and how."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from safetydpo.config.fields import Distinct, Frozen, Rate, added_field
from safetydpo.config.validation import ValidationConfig

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Linear layers of an attention layer, as diffusers names them."""
ATTENTION_BLOCKS = {"self": "attn1", "cross": "attn2"}
"""What diffusers calls the two attention layers in a block of a U-Net."""


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
    attention: Literal["all", "self", "cross"] = added_field("all")
    """Which attention layers of a U-Net get an adapter: `all`, only self-attention (attn1; the picture looks at itself)
    or only cross-attention (attn2; it looks at the prompt). Targets that are no attention projections stay as they
    are. Transformers (SD3, FLUX) have joint attention and take `all` only."""

    @property
    def layer_targets(self) -> tuple[str, ...]:
        """Name suffixes of the layers that get an adapter, after `attention`: what a LoRA signature holds."""
        if self.attention == "all":
            return self.targets
        block = ATTENTION_BLOCKS[self.attention]
        return tuple(f"{block}.{one}" if one in ATTENTION_PROJECTIONS else one for one in self.targets)

    @model_validator(mode="after")
    def _attention_can_be_told_apart(self) -> Self:
        if self.attention == "all":
            return self
        named = [one for one in self.targets if any(block in one.split(".") for block in ATTENTION_BLOCKS.values())]
        if named or not set(self.targets) & set(ATTENTION_PROJECTIONS):
            found = f"the target {named[0]!r}" if named else f"the targets {', '.join(self.targets)}"
            raise ValueError(
                f"identity.lora.attention {self.attention!r} chooses among the attention projections of "
                f"identity.lora.targets ({', '.join(ATTENTION_PROJECTIONS)}), found {found}"
            )
        return self


class TrainingConfig(Frozen):
    """How an adapter is optimised, whatever its loss."""

    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "prodigy"] = added_field("adamw")
    """`adamw` = torch's; `adamw_8bit` = that of bitsandbytes, moments of tensors from 4096 numbers on in 8 bits;
    `adafactor` = transformers', without its own learning rate, as the released SDXL launcher uses it; `prodigy` finds
    the step size itself, `learning_rate` is a factor of it (usually 1). The last and the second need
    `pip install 'safetydpo[optimizers]'`. With strategy `deepspeed` only `adamw`."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(1e-2, ge=0)
    """Decoupled weight decay of the optimizer."""
    warmup_steps: int = Field(10, ge=0)
    """Optimizer steps of linear warm-up."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up: as it is, or down to 0 over the remaining steps along half a cosine."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient clipping norm."""
    steps: int = Field(120, ge=1)
    """Optimizer steps (never multiplied by the number of processes)."""
    error_weighting: Literal["native", "velocity", "min_snr"] = "native"
    """Weight of all errors by timestep: `native` = 1, as released; `velocity` = that of the velocity's errors, so that
    an epsilon network learns at high noise too, where a picture's layout is decided; `min_snr` = that of the clean
    picture's errors, at most `min_snr_gamma` (arXiv 2303.09556), so that low noise counts for less."""
    min_snr_gamma: float = added_field(5.0, gt=0)
    """Largest signal-to-noise ratio that counts under `min_snr`; unused otherwise."""
    checkpoint_every: int = Field(40, ge=1)
    """Optimizer steps between checkpoints."""
    strategy: Literal["single", "ddp", "deepspeed"] = "deepspeed"
    """`deepspeed` = ZeRO through Ray Train; `ddp` = gradients averaged over the processes of an expert; `single` = the
    plain loop in one process."""
    zero_stage: int = Field(1, ge=1, le=3)
    """ZeRO stage when strategy is `deepspeed`: 1 and 2 share out the adapter's optimizer state (and gradients) and keep
    the whole frozen denoiser in every process; 3 shares out the denoiser's weights too."""
    base_offload: Literal["none", "cpu"] = added_field("none")
    """`cpu` = the frozen denoiser's weights stay in the host's memory and come to the device layer by layer; needs
    `zero_stage` 3."""
    activation_checkpointing: bool = added_field(False)
    """Keep the activations of few layers and compute the others again on the way back: less memory, about a third
    more time, equal gradients."""
    adapter_compute: Literal["float32", "base"] = added_field("float32")
    """In which type a low-precision base's adapter is computed while it is trained: `float32`, or that of the `base`,
    as autocast does, which is faster on a GPU. Its weights are float32 in both. Not with `zero_stage` 3."""
    compiled: bool = added_field(False)
    """Train with the denoiser's blocks compiled by `torch.compile`: faster on a GPU once every worker has spent its
    first minutes on it. Changes the last bits. Policy and reference are the same code, so that they still cancel
    exactly. Not with `zero_stage` 3."""
    loss_scaling: Literal["auto", "none", "dynamic"] = added_field("auto")
    """`dynamic` = the loss is multiplied before the way back and gradients divided after it, by a power of two that
    halves when they overflow and doubles after 2000 steps without; `auto` = that for a float16 base, else none."""
    ema_decay: float | None = added_field(None, ge=0, lt=1)
    """Decay of the running mean of the adapter's parameters over steps, which is then what is published; None = the
    parameters of the last step."""


NEEDS_REFERENCE_OUTPUT = ("retention_weight", "redirection_weight", "output_preservation_weight")
"""Options (weights, off at 0) that compare predictions with the reference's: its stored errors do not say them."""


class DpoConfig(TrainingConfig):
    """Training of one expert by Diffusion-DPO or another loss on preferences."""

    loss: Literal["sigmoid", "hinge", "ipo", "kto", "mapo"] = added_field("sigmoid")
    """Loss on preferences; formulas, units and step-0 values stand in `dpo/loss.py`. `sigmoid` = Diffusion-DPO, as
    released; `hinge` (arXiv 2305.10425) stops at a logit of 1; `ipo` (arXiv 2310.12036) aims at a logit of 1/2; `kto` =
    Diffusion-KTO (arXiv 2404.04465), each picture for itself; `mapo` (arXiv 2406.06424) without a reference: its pass
    is left out, or run for the retention, redirection and output-preservation terms alone where they are on."""
    beta: float = Field(100.0, gt=0)
    """Strength of the implicit reward (the loss uses beta / 2)."""
    winner_preservation: Rate | None = added_field(None)
    """Diffusion-SDPO (arXiv 2511.03317): scales each pair's gradient on the unsafe picture down to where the step does
    not spoil the safe one. 0 = its error just never rises, to first order; 1 = unsafe gradients that pull against it
    are left out altogether; None = off. For the losses `sigmoid` and `hinge`."""
    timestep_range: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = added_field(None)
    """First and last training timestep of all rows' draws, uniform, both inclusive; None = all of the schedule."""
    pairs_per_step: int = Field(16, ge=1)
    """Pairs in one optimizer step over all processes."""
    pairs_per_forward: int | None = added_field(None, ge=1)
    """Pairs that a process takes through the denoiser at once (with their share of the step's benign pictures); the
    gradients of a step's parts are added up. None = all of them."""
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
    output_preservation_weight: float = added_field(0.0, ge=0)
    """Weight of the squared change of the prediction on pure noise, at the last timestep under the empty caption, one
    row per pair (DUO, arXiv 2407.21035); 0 = off. In the unit of the error, like `retention_weight`; `error_weighting`
    does not apply: there is one timestep only."""
    retention_pictures: Literal["neutral", "safe", "others"] = "neutral"
    """What must not change: `neutral` = the base's pictures of `prompts.retention_prompts`; `safe` = also the safe
    pictures of the other experts' pairs; `others` = also their unsafe ones, so that each expert acts on its own
    category only and experts add up. With `safe` and `others` an expert depends on the pairs of all categories."""
    spike_limit: float = Field(10.0, gt=1.0)
    """An expert fails if its error on the safe picture stays above this multiple of the reference's."""
    spike_patience: int = Field(5, ge=1)
    """Consecutive optimizer steps above `spike_limit` after which an expert fails. Under the loss `mapo`, the mean over
    its first `spike_patience` steps stands for the reference's error."""
    draw_seed: int | None = added_field(None, ge=0)
    """Seed of the order of pairs and of all that is drawn for them (caption, timestep, noise, flip), so that runs of
    several seeds can differ in the initialisation alone; None = the run's seed."""
    draws_per_pair: int | None = added_field(None, ge=1)
    """Times that a pair is drawn anew; after that its draws are used again, in the same order. None = always anew."""
    flip_rate: Rate = added_field(0.0)
    """Share of preference rows that are seen mirrored, both pictures of a pair alike. Needs `pairs.flipped_latents`: a
    mirrored latent is not the latent of the mirrored picture."""
    latent_sampling: Literal["mean", "sample"] = added_field("mean")
    """Latents of pairs: the mean of the autoencoder's posterior, or a draw from it, anew at each use. The latter needs
    `pairs.latents` `mean_and_deviation`."""
    reference: Literal["live", "cached"] = added_field("live")
    """Errors of the reference: computed in every step, or once before training and kept in the store, where all
    experts and runs with the same pictures and draws share them. Part of the identity: they differ in the last bits."""
    validation: ValidationConfig = added_field(ValidationConfig())
    """Held-out pairs and sampled pictures every few steps, early stopping, and which state is published; off."""

    @model_validator(mode="after")
    def _loss_suits_its_terms(self) -> Self:
        if self.loss == "mapo" and self.safe_rise_weight > 0:
            raise ValueError(
                f"identity.dpo.loss 'mapo' has no reference above which an error could rise: expected "
                f"identity.dpo.safe_rise_weight 0, found {self.safe_rise_weight}; use safe_likelihood_weight (0.04 at "
                "beta 500 as released)"
            )
        if self.winner_preservation is not None and self.loss not in ("sigmoid", "hinge"):
            raise ValueError(
                f"identity.dpo.winner_preservation ({self.winner_preservation}) is derived for losses that push both "
                f"errors of a pair equally hard, identity.dpo.loss sigmoid or hinge, found {self.loss!r}"
            )
        return self

    @model_validator(mode="after")
    def _timesteps_rise(self) -> Self:
        if self.timestep_range is not None and self.timestep_range[0] > self.timestep_range[1]:
            raise ValueError(
                f"identity.dpo.timestep_range: expected the first timestep not above the last, found "
                f"{list(self.timestep_range)}"
            )
        return self

    @model_validator(mode="after")
    def _stored_errors_are_enough(self) -> Self:
        if self.reference == "live":
            return self
        if self.loss == "mapo":
            raise ValueError(
                "identity.dpo.loss 'mapo' has no reference whose errors identity.dpo.reference 'cached' could store: "
                "use 'live' with it"
            )
        if self.validation.every_steps is not None:
            raise ValueError(
                "identity.dpo.validation.every_steps keeps pairs out of training and asks the reference about them: "
                "use identity.dpo.reference 'live' with it"
            )
        for option in NEEDS_REFERENCE_OUTPUT:
            weight = getattr(self, option)
            if weight > 0:
                raise ValueError(
                    f"identity.dpo.{option} ({weight:g}) must be 0 with identity.dpo.reference 'cached': it needs what "
                    "the reference predicts, and stored are its errors only; use 'live' with it"
                )
        return self

    def draw_seed_of(self, run_seed: int) -> int:
        """Return the seed of draws of a run with that seed."""
        return run_seed if self.draw_seed is None else self.draw_seed


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
