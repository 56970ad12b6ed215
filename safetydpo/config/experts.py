"""Which experts are trained: how the pair store is divided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from safetydpo.config.fields import CATEGORIES, Distinct, Frozen, added_field

ALL_SINGLE = "all_single"
"""Name of the adapter that is trained on all pairs."""
GroupName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
"""Becomes part of folder names and of rows of the report."""


class GroupQuery(Frozen):
    """Pairs that belong together: every condition that is given must hold, by one of its values; `[]` = any.

    Category, concept and source must hold in one membership of the pair.
    """

    category: Distinct[str] = ()
    """Categories of a pair; a pair of several belongs to each."""
    concept: Distinct[str] = ()
    """Concepts, as the prompt set spells them."""
    source: Distinct[str] = ()
    """Where prompt pairs come from: name of the set, `demo`, …"""
    text: Distinct[Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]] = ()
    """Words, or words in a row, of the unsafe prompt: whole words, whatever their case. No patterns."""


class ExpertsConfig(Frozen):
    """Which experts are trained."""

    group_by: Literal["category", "concept", "none"] = "category"
    """One expert per category; per concept of the pairs; or `none` but those of `groups`."""
    groups: Mapping[GroupName, GroupQuery] = added_field({})
    """More experts by name, each with the pairs of a query, such as `{sharp: {concept: [knife, saw]}}`. A pair may be
    in several groups and trains each of them."""
    min_pairs: int = added_field(1, ge=1)
    """Fewer kept pairs than this in a group is an error that names it."""
    small_groups: Literal["refuse", "leave_out"] = added_field("refuse")
    """What becomes of concepts and categories with fewer: an error, or no expert (a warning names them; their pairs
    still train `all_single`, and so do pairs without a concept). Groups of `groups` are never left out."""
    all_single: bool = True
    """Also train one adapter on all pairs, for comparison."""
    all_single_step_factor: float = Field(2.0, gt=0)
    """Optimizer steps of `all_single` as a multiple of `dpo.steps`."""

    @model_validator(mode="after")
    def _groups_are_groups_of_their_own(self) -> Self:
        for name, query in self.groups.items():
            if name == ALL_SINGLE:
                raise ValueError(
                    f"identity.experts.groups: expected another name than {name!r}, which is the adapter of "
                    "identity.experts.all_single: rename the group"
                )
            if self.group_by == "category" and name in CATEGORIES:
                raise ValueError(
                    f"identity.experts.groups: expected each name once, found {name!r}, which is also the expert of "
                    "that category (identity.experts.group_by): rename the group"
                )
            if not any(query.model_dump().values()):
                raise ValueError(
                    f"identity.experts.groups.{name}: expected at least one of category, concept, source and text, "
                    f"found none: name what its pairs have in common, or use identity.experts.all_single for all pairs"
                )
        if self.group_by == "none" and not self.groups and not self.all_single:
            raise ValueError(
                "identity.experts: expected an expert to train, found group_by 'none', no groups and all_single off: "
                "set one of them"
            )
        return self
