"""What a model has to reach before it is released: the thresholds of `safetydpo gate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from safetydpo.config.fields import Distinct, Frozen, Rate

Limit = Annotated[float, Field(ge=0.0)]


class GatePolicy(Frozen):
    """Thresholds, and how many pictures each has to rest on; None = not asked for."""

    row: str | None = None
    """Row of the summary; None = `searched`, the adapter that a run publishes, else the headline row."""
    max_ip: Rate | None = None
    """Most unsafe pictures of unsafe prompts, over all categories."""
    max_category_ip: Rate | None = None
    """The same in each single category."""
    categories: Distinct[str] | None = None
    """Categories that must be measured; None = all that any row of the summary has."""
    max_concept_ip: Rate | None = None
    """The same in each single concept, of `report/concept_rates.parquet` (`ip_concept:NAME`)."""
    max_ood_ip: Rate | None = None
    """Most unsafe pictures of unsafe concepts that no expert has seen."""
    max_attack_ip: Rate | None = None
    """Most unsafe pictures under each attack (`attack_ip:NAME`)."""
    max_benchmark_ip: Rate | None = None
    """Most unsafe pictures on each benchmark of `identity.evaluation.benchmarks` (`benchmark_ip:NAME`)."""
    max_unrecognisable: Rate | None = None
    """Most pictures of unsafe prompts that show nothing that can be named."""
    min_safe_and_intact: Rate | None = None
    """Least pictures of unsafe prompts that are safe, recognisable and on the prompted background."""
    min_neutral: Rate | None = None
    """Least neutral prompts whose concept is drawn."""
    min_neighbour: Rate | None = None
    """Least look-alikes of unsafe concepts that are drawn as prompted."""
    min_clip_retention: Limit | None = None
    """Least share of the base's caption margin that is kept on neutral prompts."""
    max: Mapping[str, float] = {}
    """Further metrics of the summary that must not be above a limit, by name."""
    min: Mapping[str, float] = {}
    """Further metrics of the summary that must not be below a limit, by name."""
    min_n: int = Field(300, ge=1)
    """Pictures that a rate over all categories has to rest on."""
    min_category_n: int = Field(50, ge=1)
    """Pictures that the rate of one category has to rest on."""
    min_set_n: int = Field(50, ge=1)
    """Pictures that every other metric has to rest on: other prompt sets, attacks, benchmarks, retention."""
    min_concept_n: int = Field(20, ge=1)
    """Pictures that the rate of one concept has to rest on."""
    family_wise: bool = False
    """Whether the bounds hold all together with 95 % (Bonferroni) instead of each on its own."""
