from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.dpo.variants import NO_VARIANTS, Variants, gather_latents
from safetydpo.errors import SafetyDPOError

SHAPE = (1, 1, 2)
MEANS = torch.arange(6.0).reshape(3, *SHAPE).half()


def yes(*values: bool) -> torch.Tensor:
    return torch.tensor(values)


def test_by_hand() -> None:
    """Pair 2 as it is: 4 + 2 * 10 and 5 + 2 * 20; pair 0 mirrored: 9 + 3 * 10 and 8 + 3 * 20."""
    variants = Variants(
        flipped=torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0]).reshape(3, *SHAPE),
        deviations=torch.full((3, *SHAPE), 2.0),
        flipped_deviations=torch.full((3, *SHAPE), 3.0),
    )
    noise = torch.tensor([10.0, 20.0]).expand(2, *SHAPE)
    rows, is_flipped = torch.tensor([2, 0]), yes(False, True)
    found = gather_latents(MEANS, variants, rows, is_flipped=is_flipped, noise=noise)
    assert found.flatten().tolist() == [24.0, 45.0, 39.0, 68.0]
    without = gather_latents(MEANS, variants, rows, is_flipped=is_flipped)
    assert without.flatten().tolist() == [4.0, 5.0, 9.0, 8.0]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_unmirrored_means_are_the_stored_ones(rows: list[int]) -> None:
    index = torch.tensor(rows)
    found = gather_latents(MEANS, NO_VARIANTS, index, is_flipped=torch.zeros(len(rows), dtype=torch.bool))
    assert torch.equal(found, MEANS[index].float())


def test_what_is_not_stored_is_refused() -> None:
    rows = torch.tensor([0])
    with pytest.raises(
        SafetyDPOError, match=r"latents of mirrored pictures because dpo.flip_rate is above 0, found none"
    ):
        gather_latents(MEANS, NO_VARIANTS, rows, is_flipped=yes(True))
    with pytest.raises(SafetyDPOError, match=r"deviations of latents because dpo.latent_sampling is 'sample', found"):
        gather_latents(MEANS, NO_VARIANTS, rows, is_flipped=yes(False), noise=torch.zeros(1, *SHAPE))
