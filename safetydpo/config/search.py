"""Settings of the merge search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from safetydpo.config.fields import Distinct, Frozen, Rate


class SearchConfig(Frozen):
    """Search for the best merge, safety first, subject to quality floors."""

    trials: int = Field(16, ge=1)
    """Candidates in all; the plain methods come first."""
    generation_size: int = Field(4, ge=1)
    """Candidates asked at once; answers are told in trial order, so completion order cannot matter."""
    methods: Distinct[str] = ("sum", "ties", "co_merge")
    """Methods the search may choose."""
    plain_scales: Mapping[str, tuple[float, ...]] = {}
    """Global scales at which a method is tried first, with all coefficients 1; a method that is not named: 1."""
    scale_range: tuple[float, float] = (0.1, 3.0)
    """Range of the global scale (log scale)."""
    scale_ranges: Mapping[str, tuple[float, float]] = {}
    """Range of the global scale of a method that needs another one; a method that is not named: `scale_range`."""
    weight_range: tuple[float, float] = (0.5, 1.5)
    """Range of each expert's coefficient."""
    density_range: tuple[float, float] = (0.1, 0.6)
    """Range of the TIES density."""
    prompts_per_category: int = Field(10, ge=1)
    """Unsafe validation prompts per category and trial."""
    neutral_prompts: int = Field(40, ge=1)
    """Neutral validation prompts per trial."""
    neighbour_prompts: int | None = Field(None, ge=1)
    """Validation prompts of neutral neighbours per trial; None = `neutral_prompts`."""
    neutral_floor: Rate = 0.90
    """Least neutral rate relative to the base."""
    neighbour_floor: Rate = 0.80
    """Least neighbour retention relative to the base."""
    unrecognisable_weight: Rate = 1.0
    """Price of unrecognisable pictures on unsafe prompts, in points of IP; 0 = mush counts as safe."""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        ranges = {name: getattr(self, name) for name in ("scale_range", "weight_range", "density_range")}
        ranges |= {f"scale_ranges.{method}": limits for method, limits in self.scale_ranges.items()}
        for name, (low, high) in ranges.items():
            if not 0 < low <= high:
                raise ValueError(f"identity.search.{name}: expected 0 < low <= high, found [{low}, {high}]")
        return self

    @model_validator(mode="after")
    def _scales_are_of_methods(self) -> Self:
        for setting in ("scale_ranges", "plain_scales"):
            for method in getattr(self, setting):
                if method not in self.methods:
                    raise ValueError(
                        f"identity.search.{setting}: expected methods of identity.search.methods, found {method!r}: "
                        "take it out here, or add it there"
                    )
        for method, scales in self.plain_scales.items():
            low, high = self.scale_range_of(method)
            if not all(low <= scale <= high for scale in scales):
                setting = f"scale_ranges.{method}" if method in self.scale_ranges else "scale_range"
                raise ValueError(
                    f"identity.search.plain_scales.{method}: expected scales within identity.search.{setting} "
                    f"[{low}, {high}], found {list(scales)}"
                )
        return self

    def scale_range_of(self, method: str) -> tuple[float, float]:
        """Return the range of a method's global scale."""
        return self.scale_ranges.get(method, self.scale_range)
