from __future__ import annotations

import pytest
import torch

from safetydpo.diffusion.backbone import Condition

WHOLE = Condition(
    tokens=torch.arange(12.0).reshape(2, 3, 2),
    pooled=torch.arange(4.0).reshape(2, 2),
    sizes=torch.arange(12.0).reshape(2, 6),
    guidance=torch.tensor([1.0, 2.0]),
)


def assert_same(found: Condition, wanted: Condition) -> None:
    for name, value in vars(wanted).items():
        other = getattr(found, name)
        assert (value is None) == (other is None)
        assert value is None or torch.equal(value, other)


def test_rows_are_chosen_joined_and_repeated_in_every_field():
    first, second = WHOLE.select(torch.tensor([0])), WHOLE.select(torch.tensor([1]))
    assert second.guidance is not None
    assert second.guidance.tolist() == [2.0]
    assert_same(first.followed_by(second), WHOLE)
    assert_same(first.expand(3), WHOLE.select(torch.tensor([0, 0, 0])))
    assert_same(WHOLE.expand(2), WHOLE)


def test_fields_that_are_not_there_stay_so():
    bare = Condition(WHOLE.tokens)
    assert_same(bare.select(torch.tensor([1, 0])), Condition(WHOLE.tokens.flip(0)))
    assert_same(bare.map(lambda value: 2 * value), Condition(2 * WHOLE.tokens))
    assert_same(bare.followed_by(bare).expand(4), Condition(torch.cat([WHOLE.tokens, WHOLE.tokens])))


@pytest.mark.parametrize("name", ["pooled", "sizes", "guidance"])
def test_conditions_of_two_kinds_are_not_joined(name: str):
    other = Condition(WHOLE.tokens, **{name: getattr(WHOLE, name)})
    with pytest.raises(ValueError, match=f"found one with and one without {name}: encode both with the same model"):
        other.followed_by(Condition(WHOLE.tokens))


def test_a_wrong_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="expected a condition of 1 or 5 rows, found 2: one row per picture"):
        WHOLE.expand(5)
