from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from safetydpo.artifacts.adapters import (
    AdapterMetadata,
    LoraLayer,
    LoraSignature,
    adapter_from_bytes,
    adapter_hash,
    adapter_to_bytes,
)
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.merging.algebra import delta
from safetydpo.merging.merge import Expert, MergeSettings, merge_experts, merge_prepared, merge_with, prepare_experts
from safetydpo.merging.moments import BENIGN
from safetydpo.merging.registry import METHODS

SHAPES = {"a.to_q": (8, 6), "b.to_k": (12, 8), "b.to_out.0": (6, 10)}


def make_expert(name: str, *, seed: int, rank: int = 3) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        key: LoraLayer(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))
        for key, (d_in, d_out) in SHAPES.items()
    }
    signature = LoraSignature(rank, float(rank), ("to_q", "to_k", "to_out.0"))
    return Expert(name, adapter_hash(layers), layers, AdapterMetadata("base", signature, 1, categories=(name,)))


@pytest.fixture(scope="module")
def experts() -> list[Expert]:
    return [make_expert(name, seed=i) for i, name in enumerate(("hate", "sexual", "violence", "shocking"))]


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(99)
    return {key: torch.randn(12, 5, d_in, generator=generator).half() for key, (d_in, _) in SHAPES.items()}


@pytest.fixture(scope="module")
def moments() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(98)

    def moment(d_in: int) -> torch.Tensor:
        values = torch.randn(3 * d_in, d_in, generator=generator)
        return values.T @ values

    groups = ("hate", "sexual", "violence", "shocking", BENIGN)
    return {key: {group: moment(d_in) for group in groups} for key, (d_in, _) in SHAPES.items()}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_order_of_experts_changes_no_byte(experts, inputs, moments, method):
    weights = {"hate": 0.7, "sexual": 1.3, "violence": 1.0, "shocking": 0.9}
    if not METHODS[method].takes_weights:
        weights = dict.fromkeys(weights, 1.0)
    for output_rank in (None, 2):
        found = set()
        for order in itertools.permutations(experts):
            result = merge_experts(
                order,
                method=method,
                weights=weights,
                global_scale=1.5,
                output_rank=output_rank,
                inputs=inputs,
                moments=moments,
                distilled=experts[1].layers,
            )
            found.add((adapter_hash(result.layers), json.dumps([result.recipe, result.shares], sort_keys=True)))
        assert len(found) == 1


# RegMean and Iso change a single expert by design; a distilled adapter is what it is.
@pytest.mark.parametrize("method", sorted(name for name, method in METHODS.items() if not method.reshapes))
def test_one_expert_comes_back(experts, inputs, method):
    result = merge_experts(experts[:1], method=method, density=1.0, inputs=inputs)
    for key, layer in experts[0].layers.items():
        torch.testing.assert_close(delta(result.layers[key]), delta(layer), rtol=0, atol=1e-5)


def test_sum_is_exact_scaled_and_capped(experts):
    """Four experts of rank 3 sum to rank 12: capped at min(d_in, d_out) = 6, 8, 6, still exact."""
    weights = {"hate": 0.5, "sexual": 2.0, "violence": 1.0, "shocking": 1.0}
    result = merge_experts(experts, method="sum", weights=weights, global_scale=3.0)
    for key in SHAPES:
        expected = 3.0 * sum(weights[e.name] * delta(e.layers[key]).double() for e in experts)
        assert float((delta(result.layers[key]).double() - expected).norm() / expected.norm()) < 1e-6
        assert result.layers[key].down.shape[0] == min(SHAPES[key])
    assert result.overall_truncation_error == 0.0
    assert result.shares is None
    assert result.suppliers_per_layer is None
    assert result.num_suppliers is None


def test_average_is_sum_over_the_number_of_experts(experts):
    average = merge_experts(experts, method="average")
    total = merge_experts(experts, method="sum", global_scale=0.25)
    for key in SHAPES:
        torch.testing.assert_close(delta(average.layers[key]), delta(total.layers[key]))


def test_experts_of_different_ranks_add_up():
    one, two = make_expert("hate", seed=0, rank=1), make_expert("sexual", seed=1, rank=2)
    result = merge_experts([one, two], method="sum")
    for key in SHAPES:
        assert result.layers[key].down.shape[0] == 3
        expected = delta(one.layers[key]) + delta(two.layers[key])
        torch.testing.assert_close(delta(result.layers[key]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["sum", "ties", "delta_neuron", "dare", "knots", "tsv", "iso"])
def test_truncation_error_is_the_measured_one(experts, inputs, method):
    exact = merge_experts(experts, method=method, inputs=inputs)
    cut = merge_experts(experts, method=method, output_rank=2, inputs=inputs)
    squares = [0.0, 0.0]
    for key in SHAPES:
        lost = (delta(cut.layers[key]) - delta(exact.layers[key])).norm().item()
        norm = delta(exact.layers[key]).norm().item()
        assert cut.layers[key].down.shape[0] == 2
        assert cut.truncation_error[key] == pytest.approx(lost / norm, rel=1e-3)
        squares = [squares[0] + lost**2, squares[1] + norm**2]
    assert cut.overall_truncation_error == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-3)


def test_svd_states_what_it_cut_off_itself(experts):
    """At rank 2 the same as `sum` cut to rank 2, at a scale; without a rank that of one expert, 3."""
    cut = merge_experts(experts, method="sum", global_scale=2.0, output_rank=2)
    same = merge_experts(experts, method="svd", global_scale=2.0, output_rank=2)
    for key in SHAPES:
        torch.testing.assert_close(delta(same.layers[key]), delta(cut.layers[key]), rtol=1e-5, atol=1e-5)
        assert same.truncation_error[key] == pytest.approx(cut.truncation_error[key], rel=1e-5)
    assert same.overall_truncation_error == pytest.approx(cut.overall_truncation_error, rel=1e-5)
    alone = merge_experts(experts, method="svd")
    assert {layer.down.shape[0] for layer in alone.layers.values()} == {3}
    assert 0 < alone.overall_truncation_error < cut.overall_truncation_error


def test_co_merge_keeps_the_rank_and_states_who_supplies(experts, inputs):
    result = merge_experts(experts, method="co_merge", inputs=inputs)
    assert {layer.down.shape[0] for layer in result.layers.values()} == {3}
    assert result.shares is not None
    assert result.suppliers_per_layer is not None
    assert sum(result.shares.values()) == pytest.approx(1.0)
    counts = list(result.suppliers_per_layer.values())
    wanted = {"experts": 4, "fewest": min(counts), "mean": sum(counts) / 3, "most": max(counts)}
    assert result.num_suppliers == wanted
    assert list(result.shares) == ["hate", "sexual", "shocking", "violence"]
    for key, layer in result.layers.items():
        for row in layer.down:
            assert any((row == candidate).all(1).any() for candidate in (e.layers[key].down for e in experts))
        assert 1 <= result.suppliers_per_layer[key] <= 4


def test_scores_of_a_subset_need_no_other_pass(experts, inputs):
    prepared = prepare_experts(experts, inputs=inputs)
    subset = merge_experts(experts[1:3], method="co_merge", inputs=inputs)
    weights = {"hate": 0.0, "sexual": 1.0, "violence": 1.0, "shocking": 0.0}
    same = merge_prepared(prepared, method="co_merge", weights=weights)
    assert adapter_hash(subset.layers) == adapter_hash(same.layers)


def test_recipe_is_json_and_goes_into_the_file(experts):
    prepared = prepare_experts(experts)
    result = merge_prepared(prepared, method="ties", global_scale=2.0, density=0.25)
    assert result.recipe["method"] == "ties"
    assert result.recipe["density"] == 0.25
    assert [row["name"] for row in result.recipe["experts"]] == ["hate", "sexual", "shocking", "violence"]
    assert "density" not in merge_prepared(prepared, method="sum").recipe
    assert merge_prepared(prepared, method="random_winner", seed=3).recipe["seed"] == 3
    layers, metadata = adapter_from_bytes(adapter_to_bytes(result.layers, result.metadata(prepared)), source="x")
    assert metadata.recipe == result.recipe
    assert metadata.kind == "merged"
    assert metadata.base_fingerprint == "base"
    assert metadata.categories == ("hate", "sexual", "shocking", "violence")
    assert metadata.training_hash == adapter_hash(layers)


def test_disagreeing_experts_are_refused_by_the_first_difference(experts):
    one = experts[0]
    other = replace(experts[1], metadata=replace(experts[1].metadata, base_fingerprint="other"))
    with pytest.raises(SafetyDPOError, match="disagree on the base model: 'hate' has base, 'sexual' other"):
        merge_experts([one, other], method="sum")
    fewer = replace(experts[2], layers={k: v for k, v in experts[2].layers.items() if k != "b.to_k"})
    with pytest.raises(
        SafetyDPOError,
        match="disagree on LoRA targets: 'hate' has 6 keys, 'violence' 4; first difference 'b.to_k'. Retrain with",
    ):
        merge_experts([one, fewer], method="sum")
    wrong = {**experts[1].layers, "a.to_q": LoraLayer(torch.ones(3, 9), torch.ones(6, 3))}
    with pytest.raises(SafetyDPOError, match=r"'hate' has \[6, 8\], 'sexual' \[6, 9\]; first difference 'a.to_q'"):
        merge_experts([one, replace(experts[1], layers=wrong)], method="sum")
    broken = {**experts[1].layers, "b.to_k": LoraLayer(torch.full((3, 12), torch.nan), torch.ones(8, 3))}
    with pytest.raises(SafetyDPOError, match="in expert 'sexual', found NaN or infinity in 'b.to_k'"):
        merge_experts([one, replace(experts[1], layers=broken)], method="sum")
    with pytest.raises(SafetyDPOError, match="LoRA layers in expert 'hate', found none"):
        merge_experts([replace(one, layers={})], method="sum")


def test_rows_of_different_ranks_are_not_mixed(experts):
    other = make_expert("sexual", seed=1, rank=2)
    with pytest.raises(SafetyDPOError, match=r"disagree on LoRA rank: .* first difference 'a.to_q'. Retrain"):
        merge_experts([experts[0], other], method="max_magnitude")


def test_requests_that_make_no_sense_are_refused(experts):
    with pytest.raises(UsageError, match="at least one expert to merge, found none"):
        merge_experts([], method="sum")
    with pytest.raises(UsageError, match="found 'hate' twice"):
        merge_experts([experts[0], experts[0]], method="sum")
    with pytest.raises(UsageError, match=r"out of average, .*co_merge, .*, tsv, found 'tie'"):
        merge_experts(experts, method="tie")
    with pytest.raises(UsageError, match="one weight for each of hate, .* found hate"):
        merge_experts(experts, method="sum", weights={"hate": 1.0})
    with pytest.raises(UsageError, match="a weight other than 0, found none"):
        merge_experts(experts, method="sum", weights={e.name: 0.0 for e in experts})
    with pytest.raises(UsageError, match="finite weights"):
        merge_experts(experts, method="sum", weights={e.name: float("nan") for e in experts})
    with pytest.raises(UsageError, match="global scale above 0, found 0"):
        merge_experts(experts, method="sum", global_scale=0.0)
    with pytest.raises(UsageError, match=r"density in \(0, 1\], found 1.5"):
        merge_experts(experts, method="ties", density=1.5)
    with pytest.raises(UsageError, match="output rank of at least 1, found 0"):
        merge_experts(experts, method="sum", output_rank=0)
    with pytest.raises(SafetyDPOError, match="layer inputs of the base model for merge method 'co_merge', found none"):
        merge_experts(experts, method="co_merge")
    with pytest.raises(SafetyDPOError, match="found none for 'b.to_k'"):
        merge_experts(experts, method="co_merge", inputs={"a.to_q": torch.ones(1, 1, 8)})


def test_distilled_is_the_given_adapter_at_a_scale(experts):
    result = merge_experts(experts, method="distill", global_scale=1.25, distilled=experts[2].layers)
    for key, layer in experts[2].layers.items():
        torch.testing.assert_close(delta(result.layers[key]), 1.25 * delta(layer))
    assert [expert["name"] for expert in result.recipe["experts"]] == sorted(e.name for e in experts)


def test_distill_says_what_it_needs(experts):
    with pytest.raises(
        SafetyDPOError, match="expected a distilled adapter of these experts for merge method 'distill'"
    ):
        merge_experts(experts, method="distill")
    weights = {e.name: 0.5 for e in experts}
    with pytest.raises(UsageError, match="expected weights of 1 for merge method 'distill', whose result does not"):
        merge_experts(experts, method="distill", weights=weights, distilled=experts[0].layers)
    fewer = dict(list(experts[0].layers.items())[1:])
    with pytest.raises(
        SafetyDPOError, match="expected a distilled adapter of the experts' 3 layers, found 2 and a fir"
    ):
        prepare_experts(experts, distilled=fewer)


def test_regmean_takes_each_experts_own_categories(experts):
    """Moments that are zero but for one category leave that expert alone, up to the ridge."""
    moments = {
        key: {e.name: torch.zeros(shape[1], shape[1]) for e in experts} | {BENIGN: torch.zeros(shape[1], shape[1])}
        for key, shape in ((key, (layer.up.shape[0], layer.down.shape[1])) for key, layer in experts[0].layers.items())
    }
    for groups in moments.values():
        groups["sexual"] = torch.eye(groups["sexual"].shape[0])
    result = merge_experts(experts, method="regmean", moments=moments)
    only = next(expert for expert in experts if expert.name == "sexual")
    for key, layer in result.layers.items():
        torch.testing.assert_close(delta(layer), delta(only.layers[key]) / 1.01, rtol=1e-4, atol=1e-5)


def test_what_regmean_keeps_between_merges_changes_no_byte(experts, monkeypatch):
    """Three candidates of the same experts: three layers are regressed once each, not at each candidate."""
    generator = torch.Generator().manual_seed(3)
    moments = {}
    for key, layer in experts[0].layers.items():
        rows = [torch.randn(20, layer.down.shape[1], generator=generator) for _ in range(1 + len(experts))]
        names = [BENIGN, *(expert.name for expert in experts)]
        moments[key] = {name: row.T @ row / 20 for name, row in zip(names, rows, strict=True)}
    factored, count = torch.linalg.lu_factor, [0]

    def counted(*arguments):
        count[0] += 1
        return factored(*arguments)

    monkeypatch.setattr(torch.linalg, "lu_factor", counted)
    keeping, plain = prepare_experts(experts, moments=moments, keep=True), prepare_experts(experts, moments=moments)
    for weight, scale, rank in ((1.0, 1.0, None), (0.3, 1.7, 2), (0.0, 0.5, 2)):
        weights = {expert.name: weight if place == 1 else 1.0 for place, expert in enumerate(experts)}
        settings = MergeSettings(method="regmean", weights=weights, global_scale=scale, output_rank=rank)
        before = count[0]
        ours = merge_with(keeping, settings)
        assert count[0] - before == (3 if rank is None else 0)
        wanted = merge_with(plain, settings)
        for key, layer in wanted.layers.items():
            assert torch.equal(ours.layers[key].down, layer.down)
            assert torch.equal(ours.layers[key].up, layer.up)


def test_regmean_without_moments_is_refused(experts):
    with pytest.raises(SafetyDPOError, match="moments of layer inputs of the base model for merge method 'regmean'"):
        merge_experts(experts, method="regmean")
    with pytest.raises(SafetyDPOError, match="on benign prompts too, found none for"):
        merge_experts(experts, method="regmean", moments={})
