from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from safetydpo.config.fields import Distinct, Frozen, added_field
from safetydpo.config.schema import Config


class Older(Frozen):
    size: int = 3


class Newer(Frozen):
    size: int = 3
    names: Distinct[str] = added_field(("a", "b"), min_length=1)
    limit: float | None = added_field(None, ge=0)
    rate: float = added_field(0.5, ge=0, le=1)


class Group(Frozen):
    inner: Newer = Newer()


@pytest.mark.parametrize("mode", ["json", "python"])
def test_a_setting_added_later_leaves_the_dump_of_its_default_as_it_was(mode: Any):
    assert Newer().model_dump(mode=mode) == Older().model_dump(mode=mode) == {"size": 3}
    assert Group().model_dump(mode=mode) == {"inner": {"size": 3}}
    assert Newer.model_validate({"names": ["a", "b"], "limit": None, "rate": 0.5}).model_dump(mode=mode) == {"size": 3}


def test_any_other_value_is_in_the_dump():
    assert Newer(names=("b", "a")).model_dump(mode="json") == {"size": 3, "names": ["b", "a"]}
    assert Newer(limit=0.0, rate=0.0).model_dump(mode="json") == {"size": 3, "limit": 0.0, "rate": 0.0}


@given(
    st.builds(
        Newer,
        size=st.integers(),
        names=st.sampled_from([("a", "b"), ("a",), ("b", "a")]),
        limit=st.none() | st.floats(0, 9),
        rate=st.sampled_from([0.0, 0.5, 1.0]),
    )
)
def test_a_dump_reads_back_as_the_same_settings(group: Newer):
    assert Newer.model_validate(group.model_dump(mode="json")) == group
    assert Newer.model_validate(group.model_dump()) == group


def test_its_rules_hold():
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Newer(limit=-1.0)
    with pytest.raises(ValidationError, match="at least 1 item"):
        Newer(names=())
    with pytest.raises(ValidationError, match="expected each value once, found 'a' 2 times"):
        Newer(names=("a", "a"))


def test_what_pairs_gained_is_left_out_of_the_identity():
    """The five settings of the first version, and nothing else, until one is asked for."""
    first = {"unsafe_score_min", "safe_score_max", "unrecognisable_max", "min_kept_per_category", "max_error_rate"}
    assert set(Config().identity.pairs.model_dump(mode="json")) == first
    asked = Config.model_validate({"identity": {"pairs": {"max_kept_per_concept": 5}}})
    assert set(asked.identity.pairs.model_dump(mode="json")) == first | {"max_kept_per_concept"}
