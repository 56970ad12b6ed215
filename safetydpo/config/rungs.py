"""Settings of the cheap measurements that come before a candidate's full evaluation."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from safetydpo.config.fields import Frozen, Rate

Proxy = Literal["margin", "accuracy", "safe_fall", "redirection"]
"""What a rung without sampling ranks by; `search.proxy` says what each one is."""


class RungConfig(Frozen):
    """What all rungs have in common."""

    keep: float = Field(0.5, gt=0.0, le=1.0)
    """Share of a rung's candidates that go on to the next one, rounded up, at least one."""
    calibrate: int = Field(0, ge=0)
    """First trials of the search that go on whatever the rung says, so that its rank correlation with the full
    evaluation is measured on all of them and not on its favourites. Each costs a full evaluation, hence none."""
    least_correlation: float = Field(0.3, ge=-1.0, le=1.0)
    """While Spearman's rank correlation with the full evaluation, as measured so far (on at least 5 candidates), is
    below this, the rung stops nobody. -1 = it always decides."""


class HeldOutRung(RungConfig):
    """Errors of the prediction on stored pairs and benign pictures with fixed draws; nothing is sampled."""

    kind: Literal["held_out"] = "held_out"
    pairs: Literal["held_out", "all"] = "held_out"
    """Pairs that no expert has trained on (`identity.dpo.validation.every_steps` keeps some out); `all` = every kept
    pair, at draws of its own."""
    num_pairs: int = Field(64, ge=1)
    """Most pairs that are measured, spread over all."""
    draws: int = Field(2, ge=1)
    """Timesteps and noises per pair and per benign picture; the same for every candidate."""
    timestep_range: tuple[int, int] | None = None
    """Both ends inclusive; None = all training timesteps."""
    benign_pictures: int = Field(64, ge=1)
    """Benign pictures of the base that are measured."""
    proxy: Proxy = "redirection"
    """What ranks candidates that keep all ceilings; measured in docs/search.md."""
    safe_rise_max: float = Field(0.25, ge=0.0)
    """Ceiling on the relative rise of the error on safe pictures under their own captions; what lies above costs."""
    benign_rise_max: float = Field(0.08, ge=0.0)
    """Ceiling on the relative rise of the error on benign pictures; what lies above costs."""
    prompt_shift_max: float = Field(0.115, ge=0.0)
    """Ceiling on the share of a caption's effect that changes, for neutral prompts and for neighbours each; what lies
    above costs. On the demo world 0.115 is where a fifth of the neighbours is lost."""
    prompt_timestep: Rate = 0.8
    """Timestep of the noise at which prompts are asked about, as a share of the training timesteps."""

    @model_validator(mode="after")
    def _timesteps_are_ordered(self) -> Self:
        if self.timestep_range is not None and not 0 <= self.timestep_range[0] <= self.timestep_range[1]:
            raise ValueError(
                "identity.search.ladder: expected 0 <= low <= high in timestep_range, found "
                f"{list(self.timestep_range)}"
            )
        return self


class FewStepsRung(RungConfig):
    """The full evaluation in small: few steps of sampling, on the first of its prompts."""

    kind: Literal["few_steps"] = "few_steps"
    steps: int = Field(4, ge=1, le=1000)
    """Denoising steps."""
    prompts_per_category: int = Field(2, ge=1)
    """Unsafe prompts per category, of the search's own."""
    neutral_prompts: int = Field(8, ge=1)
    """Neutral prompts, of the search's own."""
    neighbour_prompts: int = Field(8, ge=1)
    """Prompts of neutral neighbours, of the search's own."""


Rung = Annotated[HeldOutRung | FewStepsRung, Field(discriminator="kind")]
