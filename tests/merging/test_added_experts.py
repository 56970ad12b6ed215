"""A prepared set that grows: the bytes of preparing all at once, at the cost of the new experts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.merging.merge import Expert, MergeSettings, PreparedExperts, add_experts, merge_with, prepare_experts
from safetydpo.merging.moments import BENIGN

MODULES = ("k", "q")
METHODS = ("co_merge", "element", "delta_neuron", "component", "regmean", "max_magnitude")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expert(number: int, *, base: str = "base") -> Expert:
    layers = {
        name: LoraLayer(random(2, 5, seed=10 * number + place), random(4, 2, seed=10 * number + place + 5))
        for place, name in enumerate(MODULES)
    }
    return Expert(f"e{number}", adapter_hash(layers), layers, AdapterMetadata(base, categories=("hate",)))


@pytest.fixture
def experts() -> list[Expert]:
    return [expert(number) for number in range(4)]


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return {name: random(7, 3, 5, seed=100 + place) for place, name in enumerate(MODULES)}


@pytest.fixture
def moments() -> dict[str, dict[str, torch.Tensor]]:
    def moment(seed: int) -> torch.Tensor:
        values = random(9, 5, seed=seed)
        return values.T @ values

    return {name: {"hate": moment(200 + place), BENIGN: moment(300 + place)} for place, name in enumerate(MODULES)}


def assert_equal(one: PreparedExperts, other: PreparedExperts) -> None:
    assert one.experts == other.experts
    assert one.scores.keys() == other.scores.keys()
    for name, scores in one.scores.items():
        for mine, theirs in zip(scores, other.scores[name], strict=True):
            assert torch.equal(mine.up, theirs.up)
            assert torch.equal(mine.down, theirs.down)
    for method in METHODS:
        mine, theirs = (merge_with(which, MergeSettings(method)) for which in (one, other))
        assert adapter_hash(mine.layers) == adapter_hash(theirs.layers)
        assert mine.won == theirs.won


@pytest.mark.parametrize("sizes", [(1, 4), (2, 3, 4), (1, 2, 3, 4)])
def test_a_set_that_grew_has_the_bytes_of_one_prepared_at_once(experts, inputs, moments, sizes):
    grown = prepare_experts(experts[: sizes[0]], inputs=inputs, moments=moments)
    for before, after in pairwise(sizes):
        grown = add_experts(grown, experts[before:after], inputs=inputs, moments=moments)
    assert_equal(grown, prepare_experts(experts, inputs=inputs, moments=moments))


def test_scores_that_grow_too_large_are_not_kept(experts, inputs, moments):
    """An expert's scores: 2 layers x (2 rows of A + 4 of B) x 7 inputs x 4 bytes = 336 bytes; three have 1008."""
    three = prepare_experts(experts[:3], inputs=inputs, moments=moments, max_score_bytes=1008)
    assert three.scores
    four = add_experts(three, experts[3:], inputs=inputs, moments=moments, max_score_bytes=1008)
    assert not four.scores
    assert_equal(four, prepare_experts(experts, inputs=inputs, moments=moments, max_score_bytes=0))
    # And from there on: nothing is known, everything is scored.
    again = add_experts(prepare_experts(experts[:3], inputs=inputs, max_score_bytes=0), experts[3:], inputs=inputs)
    assert again.scores["q"][3].up.shape == (4, 7)


def test_experts_that_cannot_be_added_are_refused(experts, inputs):
    prepared = prepare_experts(experts[:2], inputs=inputs)
    with pytest.raises(UsageError, match="every expert once, found 'e1' twice"):
        add_experts(prepared, experts[1:3], inputs=inputs)
    with pytest.raises(SafetyDPOError, match="disagree on the base model: '.*' has base, 'e9' other"):
        add_experts(prepared, [expert(9, base="other")], inputs=inputs)
    broken = {**experts[2].layers, "q": LoraLayer(torch.full((2, 5), torch.nan), torch.ones(4, 2))}
    with pytest.raises(SafetyDPOError, match="finite numbers in expert 'bad', found NaN or infinity in 'q'"):
        add_experts(prepared, [Expert("bad", "f", broken, experts[0].metadata)], inputs=inputs)
    fewer = {name: values[:6] for name, values in inputs.items()}
    with pytest.raises(SafetyDPOError, match="the 7 layer inputs that the prepared experts were scored on, found 6"):
        add_experts(prepared, experts[2:], inputs=fewer)
