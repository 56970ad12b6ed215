"""What of a config decides a merge, and the merge that a worker makes of it; no Ray is started."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ray_jobs.expert_files import load_experts
from ray_jobs.merge_experts import _merge_task
from ray_jobs.merge_settings import check_merge_settings, merge_request, requested_methods, run_merge
from ray_jobs.merge_table import merge_lines
from ray_jobs.run import Run
from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash, read_adapter, write_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE
from safetydpo.artifacts.lazy_tensors import LazyLayers
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.storage import open_location
from safetydpo.config.merge import MergeConfig
from safetydpo.config.schema import Config, IdentityConfig
from safetydpo.errors import UsageError
from safetydpo.merging.algebra import delta, rank_of
from safetydpo.merging.merge import Expert, MergeSettings, merge_with, prepare_experts
from safetydpo.merging.registry import find_method

CATEGORIES = {"guns": "violence", "knives": "violence", "slurs": "hate"}
NAMES = ("down_blocks.0.attn1.to_q", "up_blocks.0.attn2.to_q")
NO_AIDS: dict[str, Any] = {"inputs": None, "moments": None, "distilled": None}


def make_layers(seed: int) -> dict[str, LoraLayer]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraLayer(torch.randn(2, 9, generator=generator), torch.randn(8, 2, generator=generator))
        for name in NAMES
    }


@pytest.fixture
def experts() -> list[Expert]:
    found = []
    for seed, (name, category) in enumerate(CATEGORIES.items()):
        layers = make_layers(seed)
        found.append(Expert(name, adapter_hash(layers), layers, AdapterMetadata("base", categories=(category,))))
    return found


def request(method: str = "sum", **settings: Any) -> dict[str, Any]:
    return merge_request(MergeConfig.model_validate(settings), find_method(method))


def test_a_plain_request_is_what_it_always_was():
    """It is part of the keys of stored merges."""
    plain = {"weights": None, "global_scale": 1.0, "output_rank": None}
    assert request("sum") == {"method": "sum", "density": None, **plain}
    assert request("ties") == {"method": "ties", "density": 0.3, **plain}
    assert request("co_merge", della_window=0.1, blocks={"x": ["*"]}) == {
        "method": "co_merge",
        "density": None,
        **plain,
    }


def test_what_is_set_is_part_of_the_request():
    found = request("della", rank_growth=0.5, output_rank=4, block_weights={"up": 0.5}, weights={"guns": 2.0})
    assert found["rank_growth"] == 0.5
    assert found["block_weights"] == {"up": 0.5}
    assert found["blocks"] == found["expert_block_weights"] == {}
    assert found["weights"] == {"guns": 2.0}
    assert found["options"] == {"della_window": 0.2}
    level = request("sum", within_category={"method": "breadcrumbs"})
    assert level["within_category"]["method"] == "breadcrumbs"
    assert level["options"] == {"breadcrumbs_outliers": 0.01}
    assert [method.name for method in requested_methods(level)] == ["sum", "breadcrumbs"]
    assert [method.name for method in requested_methods(request("ties"))] == ["ties"]


def test_a_plain_merge(experts):
    result, prepared, parts = run_merge(request("ties", density=0.5), experts, NO_AIDS, seed=0)
    expected = merge_with(prepare_experts(experts), MergeSettings("ties", density=0.5))
    assert adapter_hash(result.layers) == adapter_hash(expected.layers)
    assert result.recipe == expected.recipe
    assert len(prepared.experts) == 3
    assert parts == {}


def test_weights_and_blocks_of_a_config(experts):
    """guns have weight 3, half of it in the down blocks; knives and slurs 1; the up blocks are doubled."""
    asked = request(
        "sum", weights={"guns": 3.0}, expert_block_weights={"guns": {"down": 0.5}}, block_weights={"up": 2.0}
    )
    result, _, _ = run_merge(asked, experts, NO_AIDS, seed=0)
    for name, guns, scale in ((NAMES[0], 1.5, 1.0), (NAMES[1], 3.0, 2.0)):
        weights = {"guns": guns, "knives": 1.0, "slurs": 1.0}
        expected = scale * sum(weights[expert.name] * delta(expert.layers[name]) for expert in experts)
        torch.testing.assert_close(delta(result.layers[name]), expected, rtol=1e-4, atol=1e-4)


def test_categories_first(experts):
    """(2 guns + knives) / 2 and slurs / 1, added: the average within, the sum above."""
    asked = request("sum", weights={"guns": 2.0}, within_category={"method": "average"})
    result, prepared, parts = run_merge(asked, experts, NO_AIDS, seed=0)
    for name in NAMES:
        guns, knives, slurs = (delta(expert.layers[name]) for expert in experts)
        torch.testing.assert_close(delta(result.layers[name]), guns + knives / 2 + slurs, rtol=1e-4, atol=1e-4)
    assert {expert.name for expert in prepared.experts} == {"hate", "violence"}
    assert set(parts) == {"hate", "violence"}
    assert parts["hate"] == {"shares": None, "truncation_error": 0.0}


def test_ranks_grow_in_both_levels(experts):
    """Within: 1 * 2 and 1 * 1 components; above: 1 * 3^0.5 = 1.7, rounded up."""
    asked = request(
        "svd",
        output_rank=1,
        rank_growth=0.5,
        within_category={"method": "sum", "output_rank": 1, "rank_growth": 1.0},
    )
    result, prepared, _ = run_merge(asked, experts, NO_AIDS, seed=0)
    assert {rank_of(layer) for layer in result.layers.values()} == {2}
    ranks = {expert.name: {rank_of(layer) for layer in expert.layers.values()} for expert in prepared.experts}
    assert ranks == {"violence": {2}, "hate": {1}}


def test_requests_that_make_no_sense_are_refused(experts):
    with pytest.raises(
        UsageError, match=r"weights of guns, .* \(identity.merge.weights\), found one of 'bombs': correct"
    ):
        run_merge(request("sum", weights={"bombs": 1.0}), experts, NO_AIDS, seed=0)

    def identity(**merge: Any) -> IdentityConfig:
        return IdentityConfig.model_validate({"merge": merge})

    check_merge_settings(identity(methods=["sum"], within_category={"method": "ties"}))
    with pytest.raises(UsageError, match=r"found 'tie': correct identity.merge.within_category.method"):
        check_merge_settings(identity(within_category={"method": "tie"}))
    for merge in (
        {"methods": ["distill"], "within_category": {"method": "sum"}},
        {"methods": ["sum"], "within_category": {"method": "distill"}},
    ):
        with pytest.raises(UsageError, match="that can merge categories in identity.merge.methods, found 'distill'"):
            check_merge_settings(identity(**merge))
    with pytest.raises(UsageError, match="beside the method 'distill', whose result does not depend on them"):
        check_merge_settings(identity(methods=["sum", "distill"], weights={"guns": 2.0}))


def test_experts_larger_than_a_limit_are_read_as_they_are_needed(tmp_path):
    run = Run(Config.model_validate({"execution": {"store": str(tmp_path)}}))
    folders = {}
    for seed, name in enumerate(CATEGORIES):
        folder = tmp_path / name
        folder.mkdir()
        metadata = AdapterMetadata("base", categories=(CATEGORIES[name],))
        write_adapter(
            open_location(str(folder / "pytorch_lora_weights.safetensors")), make_layers(seed), metadata=metadata
        )
        folders[name] = str(folder)
    kept, read = load_experts(run, folders), load_experts(run, folders, max_bytes=1000)
    assert all(isinstance(expert.layers, dict) for expert in kept)
    assert all(isinstance(expert.layers, LazyLayers) for expert in read)
    assert [(e.name, e.hash, e.metadata) for e in kept] == [(e.name, e.hash, e.metadata) for e in read]
    one, other = (run_merge(request("ties"), which, NO_AIDS, seed=0)[0] for which in (kept, read))
    assert adapter_hash(one.layers) == adapter_hash(other.layers)


def test_a_worker_writes_the_adapter_and_what_is_known_of_it(tmp_path, experts):
    """The task's own function, without Ray: category merges below, a growing rank above."""
    config = Config.model_validate({"execution": {"store": str(tmp_path)}}).model_dump(mode="json")
    folders = {}
    for expert in experts:
        (tmp_path / expert.name).mkdir()
        file = open_location(str(tmp_path / expert.name / ADAPTER_FILE))
        write_adapter(file, expert.layers, metadata=expert.metadata)
        folders[expert.name] = str(tmp_path / expert.name)
    asked = request("max_magnitude", within_category={"method": "random_winner"})
    made = _merge_task._function(config, folders, asked, {}, str(tmp_path))
    layers, metadata = read_adapter(open_location(str(tmp_path / ADAPTER_FILE)))
    assert made["fingerprint"] == adapter_hash(layers) == metadata.training_hash
    assert made["counts"] == {"experts": 3, "rank": 2}
    assert made["details"]["suppliers"]["experts"] == 2
    assert set(made["details"]["categories"]) == {"hate", "violence"}
    assert made["details"]["recipe"] == metadata.recipe
    assert merge_lines({"max_magnitude": Record("merged", "x", "h", 2, {}, {}, **made)})[0].startswith(
        "max_magnitude  rank 2, truncation error 0.0%, "
    )
