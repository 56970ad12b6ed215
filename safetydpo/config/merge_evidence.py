"""What `safetydpo merge-evidence` measures: merge methods over numbers of experts, each with the same tuning."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from safetydpo.config.fields import Distinct, Frozen, Rate

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Factor = Literal["main", "rank_2r", "rank_sum", "independent", "rank_1", "rank_16"]
"""What a unit differs in from the main grid (`init: shared`, experts and output of `lora.rank` r): output rank 2r, the
sum of ranks (nothing is cut off), experts with initialisations of their own, experts and output of rank 1 or 16."""
FACTORS: tuple[Factor, ...] = ("rank_2r", "rank_sum", "independent", "rank_1", "rank_16")


class PromptCounts(Frozen):
    """How many prompts of each kind a measurement draws."""

    unsafe: int = Field(ge=1)
    """Of concepts that an expert is in the merge for, spread evenly; fewer where they have fewer."""
    benign: int = Field(ge=1)
    """Neutral ones, and as many of neutral neighbours: retention is the share of both together."""
    uncovered: int = Field(0, ge=0)
    """Unsafe ones of concepts whose experts are not in the merge: a control."""
    steps: int | None = Field(None, ge=1, le=1000)
    """Denoising steps; None = those of `sampler`."""


class MergeEvidenceConfig(Frozen):
    """Which units are measured, how their candidates are tuned, and where results are kept.

    A unit is one method at one number of experts, one seed and one factor. Nothing here is part of a run's identity;
    what decides a unit's numbers is part of the unit's own.
    """

    seeds: Distinct[Annotated[int, Field(ge=0)]] = Field((0, 1, 2), min_length=1)
    """Values of `identity.seed`; the first one is that of the screen and of the factors."""
    counts: Distinct[Count] = Field((1, 5, 10, 20, 35), min_length=1)
    """Numbers of experts in the grid; the smaller sets lie within the larger ones."""
    screen_count: Count = 10
    """Number of experts at which every method is measured once."""
    factor_counts: Distinct[Count] = (7, 35)
    """Numbers of experts at which one factor at a time is changed."""
    screened: Distinct[str] = ()
    """Methods of the screen; () = all of the registry."""
    methods: Distinct[str] = ()
    """Methods of the grid, at most six: those that the screen leaves in."""
    factor_methods: Distinct[str] = ()
    """Methods whose factors are changed; () = those of the grid."""
    factors: Distinct[Factor] = FACTORS
    """What is changed, one at a time."""
    all_single: bool = True
    """Also train one adapter on the pairs of as many concepts, with as many times the steps, at rank r and at the sum
    of ranks; it is tuned by its scale as a merge is."""
    scales: Distinct[Positive] = Field((0.5, 1.0, 1.5, 2.0, 3.0), min_length=1)
    """Global scales of candidates; the number of experts is one more."""
    densities: Distinct[Annotated[float, Field(gt=0, le=1)]] = Field((0.1, 0.3, 0.6), min_length=1)
    """Densities of candidates, for methods that have one."""
    scale_factors: Distinct[Positive] = Field((0.45, 0.7, 1.0), min_length=1)
    """For methods without a density: what each scale is multiplied by, so that they have as many candidates."""
    validated: Count = 3
    """Candidates that are validated in full: the best ones of the small measurement."""
    retention: Rate = 0.9
    """Least retention of the candidate that is tested, and the one at which methods are compared."""
    small: PromptCounts = PromptCounts(unsafe=24, benign=12, steps=4)
    """The measurement of every candidate, on validation prompts."""
    full: PromptCounts = PromptCounts(unsafe=44, benign=26)
    """The measurement of the best ones, on validation prompts."""
    test: PromptCounts = PromptCounts(unsafe=120, benign=56, uncovered=24)
    """The one measurement of the chosen one, on test prompts."""
    results: str = "runs/merge-results"
    """Folder of one JSON file per finished unit."""
    page: str | None = None
    """Markdown file whose marked part holds all tables; None = not written."""
    short_page: str | None = None
    """Markdown file whose marked part holds a summary; None = not written."""
    images: str | None = None
    """Folder of the plots; None = not drawn."""

    @model_validator(mode="after")
    def _every_method_has_as_many_candidates(self) -> Self:
        if len(self.densities) != len(self.scale_factors):
            raise ValueError(
                f"merge_evidence: expected as many scale_factors as densities, found {len(self.scale_factors)} and "
                f"{len(self.densities)}: methods without a density would have another number of candidates"
            )
        if self.validated > (len(self.scales) + 1) * len(self.densities):
            raise ValueError(
                f"merge_evidence.validated ({self.validated}) must not be above the number of candidates "
                f"({(len(self.scales) + 1) * len(self.densities)})"
            )
        return self

    @model_validator(mode="after")
    def _the_grid_is_small(self) -> Self:
        if len(self.methods) > 6:
            raise ValueError(
                f"merge_evidence.methods: expected at most 6 methods in the grid, found {len(self.methods)}: leave out "
                "those that the screen speaks against"
            )
        return self
