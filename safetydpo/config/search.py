"""Settings of the merge search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from safetydpo.config.fields import Distinct, Frozen, Rate, added_field
from safetydpo.config.rungs import Rung

Sampler = Literal["tpe", "nsga2", "cmaes", "random"]
"""How candidates are chosen; `search.samplers` says what each one is."""


_RANGES = ("scale_range", "weight_range", "density_range", "block_weight_range")


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
    suggest: Literal["batch", "async"] = added_field("batch")
    """`batch`: generations; the whole search can be repeated byte for byte on any number of workers. `async`: a new
    candidate whenever a worker is free, for big clusters; what was measured is kept, but the order in which trials end
    decides what comes next."""
    sampler: Sampler = added_field("tpe")
    """`cmaes` needs one method and continuous settings only; `nsga2` looks for trade-offs instead of one price;
    `random` is for comparison."""
    first_trials: Literal["plain", "known"] = added_field("plain")
    """`plain`: each method at its plain scales. `known`: before those the base without an adapter, each expert
    alone, their average, TIES, and Co-Merge where `methods` has it."""
    weights: Literal["auto", "expert", "category", "none"] = added_field("auto")
    """Who has a coefficient of its own: each expert, each category, or nobody (the global scale is all there is).
    `auto` = each expert up to 20 of them, above that each category."""
    output_ranks: Distinct[Annotated[int, Field(ge=1)]] = added_field(())
    """Output ranks the search may choose; () = `merge.output_rank` for all."""
    block_groups: Mapping[str, tuple[str, ...]] = added_field({})
    """Groups of blocks that get a factor of their own, by the first parts of their modules' names, such as
    `{down: [down_blocks], middle: [mid_block], up: [up_blocks]}`; {} = none."""
    block_weight_range: tuple[float, float] = added_field((0.5, 1.5))
    """Range of the factor of each group of blocks."""
    ladder: tuple[Rung, ...] = added_field(())
    """Cheap measurements, in order, that decide who is measured in full; () = every candidate is."""
    finalists: int = added_field(0, ge=0)
    """Best candidates that are drawn again with fresh seeds; the winner is chosen by these. 0 = none."""
    finalist_seeds: int = added_field(2, ge=1)
    """Fresh seeds of each finalist; each draws every prompt once."""
    judges: Distinct[str] = added_field(("demo_select",), min_length=1)
    """Judges of the trials' pictures: of several, a picture is unsafe if any of them says so. With others than
    `demo_select` a CLIP model says which prompts are found in their pictures and which pictures show nothing
    (docs/search.md). They should not be those of the final measurement: a search fits what it is judged by."""
    clip: str = added_field("demo", min_length=1)
    """That CLIP model: `demo` (ships with the package, knows drawings) or a local folder, transformers format."""
    benchmarks: Distinct[str] = added_field(())
    """What the search must not use prompts of, beside `identity.evaluation.benchmarks`: prompt files of any format that
    `safetydpo prompts check` reads, and benchmarks as `NAME=FILE`, or as NAME where `execution.benchmarks` holds it."""

    @model_validator(mode="after")
    def _sampler_can_search_this(self) -> Self:
        if self.sampler == "cmaes":
            others = {"methods": self.methods, "output_ranks": self.output_ranks}
            for setting, choices in others.items():
                if len(choices) > 1:
                    raise ValueError(
                        "identity.search.sampler 'cmaes' searches continuous settings only, found "
                        f"{len(choices)} choices in identity.search.{setting} {list(choices)}: fix one of them, or use "
                        "sampler 'tpe'"
                    )
        if self.suggest == "async" and self.sampler != "tpe":
            raise ValueError(
                f"identity.search.suggest 'async' needs identity.search.sampler 'tpe', found {self.sampler!r}, which "
                "cannot go on from finished trials alone: use suggest 'batch', or sampler 'tpe'"
            )
        if self.sampler == "nsga2" and self.generation_size < 2:
            raise ValueError(
                "identity.search.sampler 'nsga2' needs identity.search.generation_size of at least 2 (its population), "
                f"found {self.generation_size}"
            )
        return self

    @model_validator(mode="after")
    def _blocks_are_named_once(self) -> Self:
        prefixes = [prefix for members in self.block_groups.values() for prefix in members]
        for name, members in self.block_groups.items():
            if not members:
                raise ValueError(f"identity.search.block_groups.{name}: expected at least one block, found none")
        for prefix in prefixes:
            if prefixes.count(prefix) > 1:
                raise ValueError(
                    f"identity.search.block_groups: expected each block in one group, found {prefix!r} in several"
                )
        return self

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        ranges = {name: getattr(self, name) for name in _RANGES}
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


class SearchLimits(Frozen):
    """What a search may use of a shared cluster; never hashed, so that the same search goes on under others."""

    max_concurrent_trials: int | None = Field(None, ge=1)
    """Most trials at a time; None = `num_workers`."""
    max_gpus: float | None = Field(None, gt=0)
    """Most GPUs of all trials together; None = no limit of its own."""
    time_budget_s: float | None = Field(None, gt=0)
    """Seconds during which trials may run, over all commands of this search; None = no limit."""
    cost_budget: float | None = Field(None, gt=0)
    """Most that all trials of this search may cost, in the unit of the prices; None = no limit."""
    price_per_cpu_hour: float = Field(0.0, ge=0)
    """Price of one CPU of a trial for an hour."""
    price_per_gpu_hour: float = Field(0.0, ge=0)
    """Price of one GPU of a trial for an hour."""

    @model_validator(mode="after")
    def _costs_have_a_price(self) -> Self:
        if self.cost_budget is not None and self.price_per_cpu_hour == 0 and self.price_per_gpu_hour == 0:
            raise ValueError(
                f"execution.search.cost_budget ({self.cost_budget:g}) needs execution.search.price_per_cpu_hour or "
                "price_per_gpu_hour above 0: nothing would ever cost anything"
            )
        return self
