"""Settings of merges that are made without a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import Field, model_validator

from safetydpo.config.fields import Distinct, Frozen, added_field
from safetydpo.config.training import DistillConfig

RankGrowth = Annotated[float, Field(ge=0, le=1)]
Patterns = Annotated[tuple[str, ...], Field(min_length=1)]
Factors = Mapping[str, float]


class LevelConfig(Frozen):
    """How the experts of one category are merged before the categories are."""

    method: str = "co_merge"
    """Name in the merge registry."""
    global_scale: float = Field(1.0, gt=0)
    """Multiplies the merged delta of a category."""
    density: float = Field(0.3, gt=0, le=1.0)
    """Share of entries kept by methods that trim or drop."""
    output_rank: int | None = Field(None, ge=1)
    """Rank of a category's merge by truncated SVD; None = exact."""
    rank_growth: RankGrowth = 0.0
    """As `merge.rank_growth`, with the number of experts of the category."""

    @model_validator(mode="after")
    def _growing_rank_is_given(self) -> Self:
        check_growth("identity.merge.within_category", self.rank_growth, output_rank=self.output_rank)
        return self


class MergeConfig(Frozen):
    """Merges that are made without a search."""

    methods: Distinct[str] = ("average", "sum", "ties", "co_merge")
    """Names in the merge registry."""
    global_scale: float = Field(1.0, gt=0)
    """Multiplies the merged delta."""
    density: float = Field(0.3, gt=0, le=1.0)
    """Share of entries kept by methods that trim or drop: TIES, DARE, DELLA, …"""
    output_rank: int | None = Field(None, ge=1)
    """Rank of the merged adapter by truncated SVD; None = exact (sum of ranks, at most min(d_in, d_out))."""
    rank_growth: RankGrowth = added_field(0.0)
    """How the output rank grows with the number E of experts: ceil(output_rank * E^rank_growth). 0 = not at all, 1 = as
    many components for each expert."""
    weights: Factors = added_field({})
    """Coefficient per expert; an expert that is not named: 1. An expert of weight 0 is left out of votes."""
    blocks: Mapping[str, Patterns] = added_field({})
    """Named groups of layers, as patterns of module names such as `{cross: ["*.attn2.*"]}`, beside `down`, `mid`, `up`
    of U-Nets and `joint`, `single` of transformers."""
    block_weights: Factors = added_field({})
    """Factor on the merged delta per block, by name or by the first parts of its modules' names; one that is not named:
    1."""
    expert_block_weights: Mapping[str, Factors] = added_field({})
    """Per expert a factor on its coefficient per block; what is not named: 1."""
    within_category: LevelConfig | None = added_field(None)
    """Merge the experts of each (first) category this way, then the categories by `methods`; weights are those of
    experts, and the second merge weighs all categories by 1. None = all experts at once."""
    della_window: float = added_field(0.2, ge=0)
    """Width of the range of keeping probabilities of `della`, around the density."""
    breadcrumbs_outliers: float = added_field(0.01, ge=0, lt=1)
    """Share of the largest entries that `breadcrumbs` drops."""
    activation_prompts_per_category: int = Field(8, ge=1)
    """Unsafe prompts per category whose layer inputs Co-Merge votes on."""
    activation_timesteps: Distinct[int] = Field((801, 401, 101), min_length=1)
    """Timesteps at which the layer inputs are collected."""
    distill: DistillConfig = DistillConfig()
    """Settings of the method `distill`."""

    @model_validator(mode="after")
    def _growing_rank_is_given(self) -> Self:
        check_growth("identity.merge", self.rank_growth, output_rank=self.output_rank)
        return self


def check_growth(setting: str, rank_growth: float, *, output_rank: int | None) -> None:
    """Refuse a rank that grows from none.

    Raises:
        ValueError: names both fields.
    """
    if rank_growth > 0 and output_rank is None:
        raise ValueError(
            f"{setting}.rank_growth ({rank_growth:g}) needs {setting}.output_rank, found none: set both or neither"
        )
