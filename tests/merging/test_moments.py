from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.moments import (
    BENIGN,
    ExpertMoments,
    MomentSums,
    expert_moment,
    join_moments,
    moments_from_bytes,
    moments_to_bytes,
    open_moments,
    write_moments,
)


def test_moments_by_hand():
    """Prompt 0 (hate): tokens [1 2] and [3 0] give [[1 2][2 4]] + [[9 0][0 0]] = [[10 2][2 4]]; a second timestep with
    one token [1 0] gives [[1 0][0 0]]; the mean of the two inputs is [[5.5 1][1 2]]. Prompt 1 is benign."""
    sums = MomentSums(["hate", BENIGN])
    sums("q", 0, torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    sums("q", 0, torch.tensor([[1.0, 0.0]]))
    sums("q", 1, torch.tensor([[0.0, 2.0]]))
    found = sums.means()["q"]
    assert found["hate"].tolist() == [[5.5, 1.0], [1.0, 2.0]]
    assert found[BENIGN].tolist() == [[0.0, 0.0], [0.0, 4.0]]


def test_moments_agree_with_numpy():
    values = torch.randn(12, 5, 7, generator=torch.Generator().manual_seed(0))
    sums = MomentSums(["hate"] * 12)
    for row, tokens in enumerate(values):
        sums("q", row, tokens)
    expected = np.einsum("nti,ntj->ij", values.numpy(), values.numpy()) / 12
    np.testing.assert_allclose(sums.means()["q"]["hate"].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_files_hold_what_was_written_and_equal_bytes():
    moments = {"up.q": {"hate": torch.eye(3), BENIGN: torch.ones(3, 3)}, "down.k": {"hate": torch.zeros(2, 2)}}
    data = moments_to_bytes(moments, base_fingerprint="base")
    again = {name: dict(reversed(groups.items())) for name, groups in reversed(moments.items())}
    assert moments_to_bytes(again, base_fingerprint="base") == data
    found = moments_from_bytes(data, source="x", base_fingerprint="base")
    assert {name: set(groups) for name, groups in found.items()} == {"up.q": {"hate", BENIGN}, "down.k": {"hate"}}
    assert torch.equal(found["up.q"][BENIGN], torch.ones(3, 3))


def test_damaged_and_foreign_files_are_refused():
    data = moments_to_bytes({"q": {"hate": torch.eye(3)}}, base_fingerprint="base")
    with pytest.raises(SafetyDPOError, match="expected moments of layer inputs at x, found 20 bytes"):
        moments_from_bytes(data[:20], source="x", base_fingerprint="base")
    with pytest.raises(
        SafetyDPOError, match="expected moments of layer inputs of base 'other' at x, found base 'base'"
    ):
        moments_from_bytes(data, source="x", base_fingerprint="other")


def test_an_expert_of_two_categories_has_the_inputs_of_both():
    groups = {"hate": torch.eye(2), "sexual": 2 * torch.eye(2)}
    assert torch.equal(expert_moment(groups, expert="e", categories=("hate", "sexual")), 3 * torch.eye(2))
    with pytest.raises(SafetyDPOError, match=r"categories of expert 'e' \(violence\), found hate, sexual"):
        expert_moment(groups, expert="e", categories=("violence",))
    with pytest.raises(SafetyDPOError, match=r"expert 'e' \(none named\)"):
        expert_moment(groups, expert="e", categories=())


def test_infinite_moments_are_refused_by_module():
    sums = MomentSums(["hate"])
    sums("down.q", 0, torch.full((1, 2), 1e20))
    with pytest.raises(SafetyDPOError, match="finite second moments of the inputs of 'down.q', found NaN or infinity"):
        sums.means()


def sums_of(groups: list[str], seed: int) -> MomentSums:
    generator = torch.Generator().manual_seed(seed)
    sums = MomentSums(groups)
    for row in range(len(groups)):
        for module, width in (("up.q", 3), ("down.k", 2), ("up.q", 3)):
            sums(module, row, torch.randn(4, width, generator=generator))
    return sums


def test_files_written_and_joined_tensor_by_tensor_have_the_same_bytes(store: Location):
    one, other = sums_of(["hate", "hate"], 0), sums_of([BENIGN], 1)
    for name, sums in (("one", one), ("other", other)):
        expected = moments_to_bytes(sums.means(), base_fingerprint="base")
        assert write_moments(store / name, sums, base_fingerprint="base") == hashlib.sha256(expected).hexdigest()
        assert (store / name).read_bytes() == expected
    whole = {module: groups | other.means()[module] for module, groups in one.means().items()}
    expected = moments_to_bytes(whole, base_fingerprint="base")
    sha256 = join_moments(store / "joined", [store / "other", store / "one"], base_fingerprint="base")
    assert (store / "joined").read_bytes() == expected
    assert sha256 == hashlib.sha256(expected).hexdigest()
    with pytest.raises(SafetyDPOError, match="moments of layer inputs of base 'x' at .*other, found base 'base'"):
        join_moments(store / "joined", [store / "other"], base_fingerprint="x")


def test_infinite_moments_are_not_written(store: Location):
    sums = MomentSums(["hate"])
    sums("down.q", 0, torch.full((1, 2), 1e20))
    with pytest.raises(SafetyDPOError, match="finite second moments of the inputs of 'down.q', found NaN or infinity"):
        write_moments(store / "x", sums, base_fingerprint="base")


def test_moments_are_read_when_they_are_asked_for(store: Location):
    moments = sums_of(["hate", "sexual", BENIGN], 0).means()
    (store / "x").write_bytes(moments_to_bytes(moments, base_fingerprint="base"))
    found = open_moments(store / "x", base_fingerprint="base")
    assert {module: set(groups) for module, groups in found.items()} == {
        module: set(groups) for module, groups in moments.items()
    }
    experts = [("a", ("hate",)), ("b", ("hate", "sexual")), ("c", ("hate",))]
    stored, kept = (ExpertMoments(which, ["up.q", "down.k"], experts) for which in (found, moments))
    assert all(torch.equal(*pair) for pair in zip(stored["up.q"], kept["up.q"], strict=True))
    # Nothing of the file was kept.
    (store / "x").delete()
    with pytest.raises(SafetyDPOError, match="expected a readable file"):
        found["up.q"]["hate"]
    assert torch.equal(kept["down.k"][1], moments["down.k"]["hate"] + moments["down.k"]["sexual"])
    first, _, third, _ = kept["down.k"]
    assert first is third
    assert len(kept) == 2


def test_missing_moments_are_refused_before_any_is_read():
    moments = {"q": {"hate": torch.eye(2), BENIGN: torch.eye(2)}, "k": {"hate": torch.eye(2)}}
    with pytest.raises(SafetyDPOError, match="on benign prompts too, found none for 'k'"):
        ExpertMoments(moments, ["q", "k"], [("e", ("hate",))])
    with pytest.raises(SafetyDPOError, match=r"categories of expert 'e' \(violence\), found benign, hate"):
        ExpertMoments(moments, ["q"], [("e", ("violence",))])
