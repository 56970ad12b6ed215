from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.dpo.loss import preference_loss
from safetydpo.dpo.stored_errors import ROUNDING, errors_by_draw, without_rounding


def test_errors_of_pairs_side_by_side() -> None:
    """Two draws of one pair, one of the other: the missing one is NaN."""
    found = errors_by_draw([np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[5.0, 6.0]])])
    assert found[0].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert found[1, 0].tolist() == [5.0, 6.0]
    assert bool(found[1, 1].isnan().all())
    assert errors_by_draw([]).shape == (0, 0, 2)


def test_by_hand() -> None:
    """A difference of 5e-6 of the error is rounding, one of 2e-5 is not."""
    stored = torch.tensor([2.0, 2.0, 2.0])
    policy = torch.tensor([2.0 + 1e-5, 2.0 - 1e-5, 2.0 + 4e-5], requires_grad=True)
    found = without_rounding(stored, policy)
    assert torch.equal(found, torch.tensor([*policy.detach()[:2].tolist(), 2.0]))
    assert not found.requires_grad


@given(st.lists(st.tuples(st.floats(0.125, 8, width=32), st.floats(0.125, 8, width=32)), min_size=1, max_size=9))
def test_nothing_else_changes(pairs: list[tuple[float, float]]) -> None:
    """Against numpy; and what is left in place differs from the policy by more than rounding."""
    stored, policy = (np.array(side, dtype=np.float32) for side in zip(*pairs, strict=True))
    near = np.abs(stored - policy) <= np.float32(ROUNDING) * stored
    found = without_rounding(torch.from_numpy(stored), torch.from_numpy(policy)).numpy()
    assert np.array_equal(found, np.where(near, policy, stored))


def test_the_penalty_on_the_safe_error_stays_without_gradient_while_the_adapter_changes_nothing() -> None:
    """Stored errors off by one bit, upwards and downwards: loss ln 2, and the gradient of the preference alone."""
    policy = torch.tensor([[0.1, 0.2], [0.3, 0.4]], requires_grad=True)
    stored = policy.detach() * torch.tensor([[1 - 2e-7, 1 + 2e-7], [1 + 2e-7, 1 - 2e-7]])

    def gradient(reference: torch.Tensor) -> torch.Tensor:
        safe, unsafe = reference
        loss = preference_loss(
            policy[0],
            policy[1],
            error_reference_safe=safe,
            error_reference_unsafe=unsafe,
            beta=5000.0,
            safe_rise_weight=1.0,
        )
        (found,) = torch.autograd.grad(loss.loss, policy)
        return found

    exact = gradient(policy.detach())
    assert torch.equal(
        gradient(torch.stack([without_rounding(*both) for both in zip(stored, policy, strict=True)])), exact
    )
    assert not torch.allclose(gradient(stored), exact, rtol=0.1)
