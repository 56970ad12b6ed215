from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.errors import SafetyDPOError
from safetydpo.search.pareto import pareto_front


def test_by_hand():
    """IP down, retention up: (0.1, 0.5), (0.2, 0.9) and its twin stay; (0.2, 0.8) and (0.3, 0.9) are beaten."""
    points = [(0.1, 0.5), (0.2, 0.9), (0.2, 0.8), (0.3, 0.9), (0.2, 0.9)]
    assert pareto_front(points, ["min", "max"]) == [0, 1, 4]


@given(st.lists(st.tuples(*[st.integers(0, 4).map(float)] * 3), max_size=25))
def test_equals_brute_force_in_numpy(points):
    costs = np.array(points).reshape(-1, 3) * [1, -1, 1]
    expected = [i for i, p in enumerate(costs) if not np.any(np.all(costs <= p, axis=1) & np.any(costs < p, axis=1))]
    assert pareto_front(points, ["min", "max", "min"]) == expected


@pytest.mark.parametrize("point", [(1.0,), (1.0, math.nan)])
def test_broken_points_are_refused(point):
    with pytest.raises(SafetyDPOError, match=r"expected 2 finite numbers per point, found .* at position 1"):
        pareto_front([(0.0, 0.0), point], ["min", "min"])
