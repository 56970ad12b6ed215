"""Rules between settings of a training: what would fail only after hours, or do nothing without a word.

They hold for a whole config, not for a training taken alone: several of them need the base's type or the workers.
"""

from __future__ import annotations

from safetydpo.config.training import DpoConfig, TrainingConfig

MIN_PRODIGY_RATE = 0.01


def check_training(name: str, training: TrainingConfig, *, dtype: str) -> None:
    """Check the rules between settings of one training; `name` is the path of its group, `dtype` the base's type.

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
    if training.adapter_compute == "base" and (training.strategy, training.zero_stage) == ("deepspeed", 3):
        raise ValueError(
            f"{name}.adapter_compute 'base' reads an adapter's weights itself, which {name}.zero_stage 3 shares out: "
            "use stage 1 or 2, or 'float32'"
        )
    if training.compiled and (training.strategy, training.zero_stage) == ("deepspeed", 3):
        raise ValueError(
            f"{name}.compiled reads an adapter's weights itself, which {name}.zero_stage 3 shares out: use stage 1 or "
            "2, or leave it out"
        )
    if training.optimizer == "prodigy" and training.learning_rate < MIN_PRODIGY_RATE:
        raise ValueError(
            f"{name}.optimizer 'prodigy' finds the step size itself and takes {name}.learning_rate as a factor of it, "
            f"usually 1; expected at least {MIN_PRODIGY_RATE}, found {training.learning_rate}"
        )
    if training.loss_scaling == "none" and dtype == "float16":
        raise ValueError(
            f"expected {name}.loss_scaling 'auto' or 'dynamic' with identity.base.dtype 'float16', found 'none', under "
            "which small gradients become 0: change it, or use a base.dtype of bfloat16 or float32"
        )
    if training.error_weighting != "min_snr" and training.min_snr_gamma != _default_gamma():
        raise ValueError(
            f"expected {name}.error_weighting 'min_snr' with {name}.min_snr_gamma ({training.min_snr_gamma:g}), found "
            f"{training.error_weighting!r}, under which it does nothing: set that, or leave min_snr_gamma out"
        )


def _default_gamma() -> float:
    return float(TrainingConfig.model_fields["min_snr_gamma"].default)


def check_dpo(dpo: DpoConfig, *, retention_prompts: int) -> None:
    """Check the rules between settings of the experts' training; `retention_prompts` are the run's.

    Raises:
        ValueError: naming the settings that do not go together.
    """
    _check_parts(dpo)
    if dpo.retention_weight > 0 and dpo.retention_per_step == 0:
        raise ValueError(
            "expected identity.dpo.retention_per_step of at least 1 with identity.dpo.retention_weight "
            f"({dpo.retention_weight:g}), found 0, under which it does nothing: raise that, or set the weight to 0"
        )
    if dpo.retention_weight > 0 and dpo.retention_pictures == "neutral" and retention_prompts == 0:
        raise ValueError(
            f"expected pictures to retain for identity.dpo.retention_weight ({dpo.retention_weight:g}), found "
            "identity.prompts.retention_prompts 0 and identity.dpo.retention_pictures 'neutral': raise the former, "
            "choose another of the latter, or set the weight to 0"
        )
    if dpo.redirection_weight > 0 and (dpo.captions == "safe" or dpo.empty_caption_rate == 1.0):
        found = "captions 'safe'" if dpo.captions == "safe" else "empty_caption_rate 1"
        raise ValueError(
            "expected rows with their unsafe caption for identity.dpo.redirection_weight "
            f"({dpo.redirection_weight:g}), found identity.dpo.{found}, which leaves none: use captions 'unsafe' or "
            "'both' and a lower rate of empty ones, or a weight of 0"
        )


def _check_parts(dpo: DpoConfig) -> None:
    pairs, at_once = dpo.pairs_per_step, dpo.pairs_per_forward
    if at_once is None:
        return
    if dpo.loss == "kto" and at_once < pairs:
        raise ValueError(
            "identity.dpo.loss 'kto' weighs each picture against the mean over all of a step: "
            f"identity.dpo.pairs_per_forward ({at_once}) must not split identity.dpo.pairs_per_step ({pairs})"
        )
    if pairs % at_once:
        raise ValueError(
            f"identity.dpo.pairs_per_step ({pairs}) must be a multiple of identity.dpo.pairs_per_forward ({at_once})"
        )
    if dpo.retention_weight > 0 and dpo.retention_per_step * at_once % pairs:
        raise ValueError(
            f"identity.dpo.retention_per_step ({dpo.retention_per_step}) must be a multiple of the {pairs // at_once} "
            f"parts into which identity.dpo.pairs_per_forward ({at_once}) splits identity.dpo.pairs_per_step ({pairs}),"
            " so that the mean over parts is the mean over rows"
        )


def check_workers(dpo: DpoConfig, *, workers: int) -> None:
    """Check that `workers` processes can share each step of an expert.

    Raises:
        ValueError: naming the settings that do not go together.
    """
    together = f"execution.workers_per_expert ({workers})"
    if dpo.strategy == "single" and workers != 1:
        raise ValueError(
            "identity.dpo.strategy 'single' trains an expert in one process: expected execution.workers_per_expert 1, "
            f"found {workers}; use strategy 'ddp' or 'deepspeed', or set it to 1"
        )
    benign = dpo.retention_per_step if dpo.retention_weight > 0 else 0
    for what, count in (("pairs_per_step", dpo.pairs_per_step), ("retention_per_step", benign)):
        if count % workers:
            raise ValueError(
                f"expected identity.dpo.{what} to be a multiple of {together}, so that every worker has as many rows "
                f"of a step, found {count}: change either"
            )
    own, at_once = dpo.pairs_per_step // workers, dpo.pairs_per_forward
    if at_once is None or at_once >= own:
        return
    parts, left = divmod(own, at_once)
    if left or benign // workers % parts:
        raise ValueError(
            f"expected identity.dpo.pairs_per_forward ({at_once}) to split the rows of a step that each of "
            f"{together} takes into equal parts, found {own} pairs and {benign // workers} benign pictures: change "
            "pairs_per_forward, pairs_per_step or retention_per_step"
        )
