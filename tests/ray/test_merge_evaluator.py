"""One evaluator with two experts of the demo model, measured at every rung, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.expert_plan import plan_experts
from ray_jobs.merge_evaluator import MergeEvaluator, small_set
from ray_jobs.merge_settings import candidate_request, searched_settings
from ray_jobs.search_merges import validation_prompts
from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash, write_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.merge import MergeConfig
from safetydpo.config.rungs import FewStepsRung
from safetydpo.config.schema import Config
from safetydpo.diffusion.build import load_backbone
from safetydpo.dpo.engine import lora_signature
from safetydpo.errors import SafetyDPOError
from safetydpo.search.recognition import LEAST_SIMILARITY
from safetydpo.search.space import Candidate
from tests.ray.closed_artifacts import close_training_data, open_run
from tests.ray.smoke_place import SMOKE

SETTINGS = [
    "identity.dpo.validation={every_steps: 5, held_out_rate: 0.25}",
    "identity.search.methods=[sum, ties]",
    "identity.search.prompts_per_category=1",
    "identity.search.neutral_prompts=3",
    "identity.search.neighbour_prompts=2",
    "identity.search.ladder=[{kind: held_out, num_pairs: 4, benign_pictures: 2}, {kind: few_steps, steps: 2, "
    "prompts_per_category: 1, neutral_prompts: 1, neighbour_prompts: 1}]",
]
WEIGHTS = (("shocking", 1.0), ("violence", 0.5))


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> MergeEvaluator:
    return make_evaluator(tmp_path_factory.mktemp("evaluator"))


def make_evaluator(place: Path, *changes: str, **more: Any) -> MergeEvaluator:
    """Return an evaluator of two experts that nobody trained."""
    run = open_run(SMOKE, [f"store={place}/store", f"run_dir={place}/run", *SETTINGS, *changes])
    record, pairs_folder = close_training_data(run)
    backbone, lora = load_backbone(run.config.identity.base), run.config.identity.lora
    folders = {}
    for seed, unit in enumerate(plan_experts(run, record, pairs_folder)):
        if unit.name == ALL_SINGLE:
            continue
        generator = torch.Generator().manual_seed(seed)
        layers = {
            name: LoraLayer(
                0.1 * torch.randn(lora.rank, d_in, generator=generator),
                0.1 * torch.randn(d_out, lora.rank, generator=generator),
            )
            for name, (d_in, d_out) in backbone.named_linear_layers(lora.layer_targets)
        }
        folder = run.store / "made" / unit.name
        metadata = AdapterMetadata(
            base_fingerprint=backbone.fingerprint,
            denoiser=backbone.denoiser,
            signature=lora_signature(lora),
            training_hash=adapter_hash(layers),
        )
        write_adapter(folder / ADAPTER_FILE, layers, metadata=metadata)
        folders[unit.name] = folder.path
    config = json.loads(run.config.model_dump_json())
    return MergeEvaluator(config, folders, {}, validation_prompts(run), pairs_folder.path, **more)


def test_every_rung_gives_its_numbers_and_the_same_ones_each_time(evaluator: MergeEvaluator) -> None:
    """Pictures: none, then 2 + 1 + 1 of 2 x 1 unsafe, 3 neutral and 2 neighbour prompts, then all 7."""
    candidate = Candidate("sum", 1.5, WEIGHTS)
    first = [evaluator.measure_rung(candidate, rung) for rung in range(3)]
    assert [one.pictures for one in first] == [0, 4, 7]
    assert set(first[0].numbers) >= {"redirection", "margin", "safe_rise", "benign_rise"}
    assert set(first[1].numbers) == set(first[2].numbers) >= {"ip_select", "neutral_rate", "neighbour_retention"}
    base = evaluator.measure_rung(None, 0).numbers
    assert base["benign_rise"] == 0.0 != first[0].numbers["benign_rise"]
    again = [evaluator.measure_rung(candidate, rung) for rung in (2, 0, 1)]
    assert again == [first[2], first[0], first[1]]
    assert evaluator.measure(candidate) == first[2].numbers


def test_a_rank_of_its_own_replaces_that_of_the_run(evaluator: MergeEvaluator) -> None:
    def rank(candidate: Candidate) -> int:
        evaluator.swap(candidate)
        layers: dict[str, Any] = evaluator.backbone.export_adapter()
        return max(layer.down.shape[0] for layer in layers.values())

    assert rank(Candidate("sum", 1.0, WEIGHTS)) == 8
    assert rank(Candidate("sum", 1.0, WEIGHTS, rank=3)) == 3


def test_the_small_set_is_the_beginning_of_each_kind(evaluator: MergeEvaluator) -> None:
    prompts = validation_prompts(evaluator.run)
    chosen = small_set(prompts, FewStepsRung(prompts_per_category=1, neutral_prompts=2, neighbour_prompts=1))
    assert [one.prompt_set for one in chosen] == ["unsafe", "unsafe", "neutral", "neutral", "neighbour"]
    assert chosen == [one for one in prompts if one in chosen]
    assert {one.category for one in chosen[:2]} == {"violence", "shocking"}


def test_a_candidate_is_merged_with_the_runs_settings_where_it_has_none() -> None:
    """Growth of the rank, blocks and a method's options are the run's; a rank of its own does not grow."""
    merge = MergeConfig(output_rank=4, rank_growth=0.5, blocks={"late": ("up_blocks.*",)}, della_window=0.2)
    plain = {"method": "sum", "weights": dict(WEIGHTS), "global_scale": 1.0, "density": None, "output_rank": 4}
    assert candidate_request(MergeConfig(output_rank=4), Candidate("sum", 1.0, WEIGHTS)) == plain
    assert candidate_request(merge, Candidate("sum", 1.0, WEIGHTS)) == {**plain, "rank_growth": 0.5}
    assert candidate_request(merge, Candidate("sum", 1.0, WEIGHTS, rank=2)) == {**plain, "output_rank": 2}
    factors = Candidate("sum", 1.0, WEIGHTS, block_weights=(("late", 0.5),), rank=4)
    found = candidate_request(merge, factors)
    assert found["block_weights"] == {"late": 0.5}
    assert list(found["blocks"]["late"]) == ["up_blocks.*"]
    assert candidate_request(merge, Candidate("della", 1.0, WEIGHTS, 0.3))["options"]["della_window"] == 0.2


def test_the_key_of_a_search_names_those_settings_only_where_they_are_used() -> None:
    identity = Config.model_validate({"name": "x"}).identity
    assert searched_settings(identity) == {}
    grown = identity.model_copy(update={"merge": MergeConfig(output_rank=4, rank_growth=0.5, della_window=0.2)})
    assert searched_settings(grown) == {"merge": {"rank_growth": 0.5}}


def test_judges_of_real_pictures_measure_by_what_the_base_said(tmp_path: Path) -> None:
    """The base comes first, at each rung that draws; workers are told what it said."""
    named = "identity.search.judges=[open_nsfw]"
    evaluator, candidate = make_evaluator(tmp_path / "one", named), Candidate("sum", 1.5, WEIGHTS)
    with pytest.raises(SafetyDPOError, match="expected the base to be measured at rung 2 first"):
        evaluator.measure(candidate)
    base = {rung: evaluator.measure_rung(None, rung).numbers for rung in (1, 2)}
    assert all(numbers["ip_select"] == 0.0 for numbers in base.values())
    measured = evaluator.measure(candidate)
    assert LEAST_SIMILARITY not in measured
    assert set(measured) | {LEAST_SIMILARITY} == set(base[2]) == set(base[1])
    # Cosines are at most 1: by such a base nobody draws anything.
    least = {1: base[1][LEAST_SIMILARITY], 2: 1.5}
    told = make_evaluator(tmp_path / "other", named, least_similarities=least)
    assert told.measure_rung(candidate, 1).numbers == evaluator.measure_rung(candidate, 1).numbers
    assert told.measure(candidate) == {**measured, "unrecognisable_rate": 1.0}
