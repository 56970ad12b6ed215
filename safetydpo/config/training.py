"""Settings of training: the LoRA signature, what is optimised and how, and which experts are made."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from safetydpo.config.fields import Distinct, Frozen, Rate, added_field


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
    error_weighting: Literal["native", "velocity"] = "native"
    """Weight of all errors by timestep: `native` = 1, as released; `velocity` = that of the velocity's errors, so that
    an epsilon network learns at high noise too, where a picture's layout is decided."""
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
    loss_scaling: Literal["auto", "none", "dynamic"] = added_field("auto")
    """`dynamic` = the loss is multiplied before the way back and gradients divided after it, by a power of two that
    halves when they overflow and doubles after 2000 steps without; `auto` = that for a float16 base, else none."""
    ema_decay: float | None = added_field(None, ge=0, lt=1)
    """Decay of the running mean of the adapter's parameters over steps, which is then what is published; None = the
    parameters of the last step."""


def check_training(name: str, training: TrainingConfig) -> None:
    """Check the rules between settings of one training; `name` is the path of its group.

    Raises:
        ValueError: naming the settings that do not go together.
    """
    if training.warmup_steps >= training.steps:
        raise ValueError(f"{name}.warmup_steps ({training.warmup_steps}) must be below {name}.steps ({training.steps})")
    if training.strategy == "deepspeed" and training.optimizer != "adamw":
        raise ValueError(
            f"{name}.strategy 'deepspeed' trains with {name}.optimizer 'adamw' only, found {training.optimizer!r}: "
            "use strategy 'single' or 'ddp' with it"
        )
    if training.base_offload == "cpu" and (training.strategy, training.zero_stage) != ("deepspeed", 3):
        raise ValueError(
            f"{name}.base_offload 'cpu' needs {name}.strategy 'deepspeed' and {name}.zero_stage 3, found "
            f"{training.strategy!r} and {training.zero_stage}"
        )
    if training.optimizer == "prodigy" and training.learning_rate < MIN_PRODIGY_RATE:
        raise ValueError(
            f"{name}.optimizer 'prodigy' finds the step size itself and takes {name}.learning_rate as a factor of it, "
            f"usually 1; expected at least {MIN_PRODIGY_RATE}, found {training.learning_rate}"
        )
    if isinstance(training, DpoConfig):
        _check_parts(name, training)


MIN_PRODIGY_RATE = 0.01


def _check_parts(name: str, dpo: DpoConfig) -> None:
    pairs, at_once = dpo.pairs_per_step, dpo.pairs_per_forward
    if at_once is None:
        return
    if pairs % at_once:
        raise ValueError(f"{name}.pairs_per_step ({pairs}) must be a multiple of {name}.pairs_per_forward ({at_once})")
    if dpo.retention_weight > 0 and dpo.retention_per_step * at_once % pairs:
        raise ValueError(
            f"{name}.retention_per_step ({dpo.retention_per_step}) must be a multiple of the {pairs // at_once} parts "
            f"into which {name}.pairs_per_forward ({at_once}) splits {name}.pairs_per_step ({pairs}), so that the mean "
            "over parts is the mean over rows"
        )


class DpoConfig(TrainingConfig):
    """Training of one expert by Diffusion-DPO."""

    beta: float = Field(100.0, gt=0)
    """Strength of the implicit reward (the loss uses beta / 2)."""
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
    retention_pictures: Literal["neutral", "safe", "others"] = "neutral"
    """What must not change: `neutral` = the base's pictures of `prompts.retention_prompts`; `safe` = also the safe
    pictures of the other experts' pairs; `others` = also their unsafe ones, so that each expert acts on its own
    category only and experts add up. With `safe` and `others` an expert depends on the pairs of all categories."""
    spike_limit: float = Field(10.0, gt=1.0)
    """An expert fails if its error on the safe picture stays above this multiple of the reference's."""
    spike_patience: int = Field(5, ge=1)
    """Consecutive optimizer steps above `spike_limit` after which an expert fails."""


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
