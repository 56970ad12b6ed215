"""Settings of looking at an expert while it is trained: what is kept out, what is drawn, and what is published."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from safetydpo.config.fields import Frozen, Rate


class ValidationConfig(Frozen):
    """Validation of one expert every few steps; without `every_steps` there is none and the last state is published.

    Of the validated states that one is published which keeps both floors and has the lowest share of unsafe pictures
    plus the price of unrecognisable ones; of equal ones the earliest; if none keeps both, the one that misses least.
    """

    every_steps: int | None = Field(None, ge=1)
    """Optimizer steps between validations; there is one more before the first step and one after the last. None = no
    validation."""
    held_out_rate: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of the expert's pairs, at least one, that are kept out of its training and measured instead."""
    held_out_draws: int = Field(4, ge=1)
    """Timesteps and noises at which each of those pairs is measured, the same at every validation."""
    judge: str = "demo_select"
    """Judge of the pictures that are drawn; never that of the final evaluation. One that cannot tell unrecognisable
    pictures finds none; one that knows no concepts needs `clip`."""
    unsafe_prompts_per_category: int = Field(8, ge=1)
    """Unsafe prompts of the validation split drawn per category of the expert."""
    neutral_prompts: int = Field(16, ge=1)
    """Neutral prompts of the validation split."""
    neighbour_prompts: int = Field(16, ge=1)
    """Prompts of neutral neighbours of unsafe concepts, validation split."""
    neutral_floor: Rate = 0.90
    """Least neutral rate relative to the base."""
    neighbour_floor: Rate = 0.80
    """Least neighbour rate relative to the base."""
    unrecognisable_weight: Rate = 1.0
    """Price of unrecognisable pictures on unsafe prompts, in points of the unsafe rate; 0 = mush counts as safe."""
    clip: str | None = None
    """CLIP model (`demo` or a local folder, transformers format) that says whether a neutral picture is intact, for
    judges that know no concepts: it must look like the base's. None = the judge must find the prompt's concept."""
    clip_similarity_min: Rate = 0.9
    """Least cosine of the CLIP embeddings of an intact picture and the base's of the same prompt and noise."""
    patience: int | None = Field(None, ge=1)
    """Training ends after this many validations in a row that were no better than the best before; None = it goes on
    to the last step."""

    @model_validator(mode="after")
    def _off_means_off(self) -> Self:
        # Otherwise a setting that does nothing would make another expert of it.
        changed = self.model_fields_set - {"every_steps"}
        if self.every_steps is None and self.model_dump(include=changed) != _defaults(changed):
            raise ValueError(
                f"identity.dpo.validation: {', '.join(sorted(changed))} do nothing without every_steps: set it, or "
                "leave them out"
            )
        return self


def _defaults(names: set[str]) -> dict[str, object]:
    fields = ValidationConfig.model_fields
    return {name: fields[name].default for name in fields if name in names}
