from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safetydpo.errors import SafetyDPOError
from safetydpo.judges.layered_distance import layered_distance


def layers(seed: int, pairs: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(pairs, c, p, generator=generator, dtype=torch.float64) for c, p in ((3, 4), (5, 2))]


def test_by_hand() -> None:
    """One layer, two positions. (3, 4) and (4, 3) have length 5: (3/5 - 4/5)^2 + (4/5 - 3/5)^2 = 0.08; the other
    position is equal: mean 0.04. With weights (1, 3): (0.04 + 3 * 0.04) / 2 = 0.08."""
    own = [torch.tensor([[[3.0, 1.0], [4.0, 0.0]]], dtype=torch.float64)]
    other = [torch.tensor([[[4.0, 2.0], [3.0, 0.0]]], dtype=torch.float64)]
    assert layered_distance(own, other).tolist() == pytest.approx([0.04])
    weights = [torch.tensor([1.0, 3.0], dtype=torch.float64)]
    assert layered_distance(own, other, weights=weights).tolist() == pytest.approx([0.08])


@pytest.mark.parametrize("learned", [False, True])
def test_against_numpy(learned: bool) -> None:
    own, other = layers(0), layers(1)
    weights = [torch.rand(layer.shape[1], dtype=torch.float64) for layer in own] if learned else None
    expected = np.zeros(2)
    for index, (a, b) in enumerate(zip(own, other, strict=True)):
        for pair in range(2):
            total = 0.0
            for position in range(a.shape[2]):
                x, y = a[pair, :, position].numpy(), b[pair, :, position].numpy()
                square = (x / np.linalg.norm(x) - y / np.linalg.norm(y)) ** 2
                total += float(square.sum() / 2 if weights is None else square @ weights[index].numpy())
            expected[pair] += total / a.shape[2]
    np.testing.assert_allclose(layered_distance(own, other, weights=weights).numpy(), expected, rtol=1e-8)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_zero_for_equal_pictures_and_the_same_from_either_side(first: int, second: int) -> None:
    own, other = layers(first), layers(second)
    assert torch.equal(layered_distance(own, own), torch.zeros(2, dtype=torch.float64))
    there, back = layered_distance(own, other), layered_distance(other, own)
    assert torch.equal(there, back)
    assert bool((there >= 0).all())
    assert bool((there <= 4 + 1e-9).all())


def test_a_layer_that_says_nothing_is_no_nan() -> None:
    """Rectified layers may be zero everywhere: against a direction of length 1 that is a distance of 1."""
    nothing, something = [torch.zeros(1, 2, 1)], [torch.tensor([[[0.0], [2.0]]])]
    assert layered_distance(nothing, something).tolist() == pytest.approx([1.0])
    assert layered_distance(nothing, nothing).tolist() == [0.0]


@pytest.mark.parametrize(
    ("own", "other", "weights"),
    [
        ([], [], None),
        ([torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 4)], None),
        ([torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 3)], [torch.zeros(3)]),
    ],
    ids=["none", "sizes", "heads"],
)
def test_other_layers_are_refused(own: list[Tensor], other: list[Tensor], weights: list[Tensor] | None) -> None:
    with pytest.raises(SafetyDPOError, match="expected the same layers of both pictures and a weight per channel"):
        layered_distance(own, other, weights=weights)
