"""Two random experts of the demo model, tuned and tested in this process, and again from what was kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.expert_plan import plan_experts
from ray_jobs.merge_bench import MergeBench, draw_list
from ray_jobs.merge_evidence import Opened, measure_merges, measure_unit, open_bench
from ray_jobs.merge_evidence_plan import plan_merges
from ray_jobs.merge_evidence_tables import write_merge_tables
from ray_jobs.merge_tested import AuditedTest, count_tested
from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash, write_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE
from safetydpo.artifacts.storage import Location
from safetydpo.config.load import load_config
from safetydpo.config.merge_evidence import PromptCounts
from safetydpo.config.schema import Config
from safetydpo.diffusion.build import load_backbone
from safetydpo.dpo.engine import lora_signature
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.merge_curve import Tuning
from safetydpo.evaluation.merge_units import dump_merge_unit, parse_merge_unit
from safetydpo.prompts.sets import Prompt
from safetydpo.search.space import Candidate
from tests.ray.closed_artifacts import close_pairs
from tests.ray.smoke_place import SMOKE
from tests.ray.tiny_merges import tiny_settings


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config(SMOKE, tiny_settings(tmp_path_factory.mktemp("bench")))


@pytest.fixture(scope="module")
def opened(config: Config) -> Opened:
    """The experts as the stages of the units' run find them: closed, with all of their layers, at random."""
    units = plan_merges(config)
    run = units[0].run
    backbone, lora = load_backbone(run.config.identity.base), run.config.identity.lora
    for seed, unit in enumerate(plan_experts(run, *close_pairs(run))):
        generator = torch.Generator().manual_seed(seed)
        layers = {
            module: LoraLayer(
                0.1 * torch.randn(lora.rank, d_in, generator=generator),
                0.1 * torch.randn(d_out, lora.rank, generator=generator),
            )
            for module, (d_in, d_out) in backbone.named_linear_layers(lora.layer_targets)
        }
        metadata = AdapterMetadata(
            base_fingerprint=backbone.fingerprint,
            denoiser=backbone.denoiser,
            signature=lora_signature(lora),
            training_hash=adapter_hash(layers),
        )

        def make(folder: Location, layers: Any = layers, metadata: Any = metadata) -> dict[str, Any]:
            write_adapter(folder / ADAPTER_FILE, layers, metadata=metadata)
            return {"fingerprint": adapter_hash(layers)}

        run.make(unit.key, make)
    return open_bench(units)


@pytest.fixture
def bench(opened: Opened) -> MergeBench:
    return opened.bench


def test_the_stages_find_the_experts_of_a_unit(opened: Opened, config: Config) -> None:
    unit = plan_merges(config)[0]
    assert opened.bench.names == tuple(sorted(unit.experts))
    assert opened.training_seconds < 60
    assert len(unit.experts) == 2


@pytest.mark.parametrize(("method", "density"), [("sum", None), ("ties", 0.3)])
def test_a_candidate_is_the_merge_at_its_scale(bench: MergeBench, method: str, density: float | None) -> None:
    """Independently: the merging code with the scale given to it; equal but for rounding, at the rank of an expert."""
    weights = tuple((name, 1.0) for name in sorted(bench.names))
    expected = bench.evaluator.merge(Candidate(method, 1.7, weights, density))
    merged = bench.merge(method, Tuning(1.7, density))
    assert merged.truncation_error == pytest.approx(expected.overall_truncation_error, rel=1e-5)
    for name, layer in expected.layers.items():
        change = layer.up @ layer.down
        found = merged.layers[name].up @ merged.layers[name].down
        assert layer.down.shape[0] == 4
        assert (found - change).norm() <= 1e-5 * change.norm()


def test_a_selection_says_how_many_experts_supply_a_layer(bench: MergeBench) -> None:
    """Of two experts at random, both supply rows of nearly every layer."""
    suppliers = bench.merge("max_magnitude", Tuning(1.0)).suppliers
    assert suppliers is not None
    assert 1.5 < suppliers <= 2
    assert suppliers == bench.merge("max_magnitude", Tuning(0.5)).suppliers
    assert bench.merge("sum", Tuning(1.0)).suppliers is None


def test_prompts_of_a_measurement(config: Config) -> None:
    unit = plan_merges(config)[0]
    identity, covered = unit.run.config.identity, unit.concepts

    def texts(counts: PromptCounts, split: str) -> list[str]:
        return [prompt.text for prompt in draw_list(identity, counts, split, covered)]

    counts = PromptCounts(unsafe=6, benign=3, uncovered=2)
    prompts = draw_list(identity, counts, "test", covered)
    assert [prompt.prompt_set for prompt in prompts] == ["unsafe"] * 6 + ["neutral"] * 3 + ["neighbour"] * 3 + [
        "unsafe"
    ] * 2
    assert sorted({prompt.concept for prompt in prompts[:6]}) == sorted(covered)
    assert not {prompt.concept for prompt in prompts[-2:]} & set(covered)
    assert {prompt.split for prompt in prompts} == {"test"}
    small = texts(PromptCounts(unsafe=2, benign=2), "validation")
    assert set(small) < set(texts(PromptCounts(unsafe=6, benign=3), "validation"))
    with pytest.raises(SafetyDPOError, match="expected unsafe test prompts of the covered concepts"):
        draw_list(identity, counts, "test", ["none"])


def test_equal_adapters_are_measured_once(bench: MergeBench, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sum` and `svd` at rank 4 cut the same change to the same rank; two scales of one method do not."""
    unit = plan_merges(config)[0]
    prompts = draw_list(unit.run.config.identity, PromptCounts(unsafe=2, benign=1), "validation", unit.concepts)
    merged = bench.merge("sum", Tuning(1.0))
    first = bench.validate(merged, prompts, steps=1)
    assert {name: n for name, (_, n) in first.found.items()} == {
        "ip": 2,
        "unrecognisable": 2,
        "neutral": 1,
        "neighbour": 1,
    }
    assert first.cpu_seconds > 0
    monkeypatch.setattr(bench.evaluator, "draw", lambda *_a, **_k: pytest.fail("drawn again"))
    assert bench.validate(bench.merge("svd", Tuning(1.0)), prompts, steps=1) == first
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        bench.validate(bench.merge("sum", Tuning(1.5)), prompts, steps=1)


def test_a_unit_is_measured_and_again_from_what_was_kept(
    opened: Opened, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = next(unit for unit in plan_merges(config) if unit.method == "ties")
    measured = measure_unit(unit, opened, version=("c0ffee", False))
    assert [one.tuning for one in measured.candidates] == [Tuning(0.5, 0.3), Tuning(2.0, 0.3)]
    assert [index for index, _ in measured.validated] == [measured.chosen]
    assert {name: n for name, (_, n) in measured.tested.items()} == {
        "ip": 4,
        "unrecognisable": 4,
        "safe_and_intact": 4,
        "neutral": 4,
        "neighbour": 4,
        "uncovered_ip": 2,
    }
    assert set(measured.counts.rates["ip"]) == set(unit.concepts)
    assert measured.base["test"]["neutral"][1] == 4
    assert (measured.experts, measured.training_seconds) == (opened.experts, opened.training_seconds)
    assert measured.dirty  # The code under test is another commit than the one that was named.
    monkeypatch.setattr(opened.bench.evaluator, "draw", lambda *_a, **_k: pytest.fail("drawn again"))
    monkeypatch.setattr(AuditedTest, "draw", lambda *_a, **_k: pytest.fail("drawn again"))
    again = measure_unit(unit, opened, version=("c0ffee", False))
    assert (again.candidates, again.tested, again.counts) == (measured.candidates, measured.tested, measured.counts)


def _row(prompt: Prompt, *, unsafe: bool, found: bool = True, margin: float = 1.0) -> dict[str, Any]:
    said = {
        "concept": prompt.concept if found else "other",
        "background": prompt.background,
        "unsafe": unsafe,
        "unrecognisable": False,
    }
    return {"judges": {"select": said, "audit": said}, "clip": [2.0, 2.0 - margin]}


def test_a_test_counts_uncovered_concepts_apart() -> None:
    """Of two covered prompts one is unsafe; both uncovered ones are; half of the base's margin is kept."""

    def prompt(text: str, kind: str, concept: str) -> Prompt:
        category = "hate" if kind == "unsafe" else ""
        return Prompt(text, kind, "test", concept, category, (category,) if category else (), "white")

    prompts = [
        prompt("a", "unsafe", "bomb"),
        prompt("b", "unsafe", "bomb"),
        prompt("c", "neutral", "dog"),
        prompt("d", "neighbour", "fist"),
        prompt("e", "unsafe", "skull"),
        prompt("f", "unsafe", "skull"),
    ]
    found = [
        _row(prompts[0], unsafe=True),
        _row(prompts[1], unsafe=False, found=False),
        _row(prompts[2], unsafe=False, margin=0.5),
        _row(prompts[3], unsafe=False, found=False),
        *(_row(one, unsafe=True) for one in prompts[4:]),
    ]
    base = [_row(one, unsafe=one.prompt_set == "unsafe") for one in prompts]
    tally, counts = count_tested(found, base, prompts, covered=["bomb"])
    assert tally == {
        "ip": (1, 2),
        "unrecognisable": (0, 2),
        "safe_and_intact": (1, 2),
        "neutral": (1, 1),
        "neighbour": (0, 1),
        "uncovered_ip": (2, 2),
    }
    assert counts.sums["clip_margin"] == {"dog": (0.5, 1)}
    assert counts.sums["clip_margin:base"] == {"dog": (1.0, 1)}


def test_the_measurement_from_the_first_unit_to_the_page(opened: Opened, config: Config) -> None:
    """Both units, whose measurements are partly there already, then the tables: what the command does."""
    assert opened.bench.names
    said: list[str] = []
    measure_merges(config, say=said.append)
    assert said[0] == "0 of 2 units are done, 2 to do"
    assert said[-1].startswith("unit 2 of 2: ties, 2 experts, seed 3: ")
    assert [unit.state for unit in plan_merges(config)] == ["done", "done"]
    (page,) = write_merge_tables(config)
    assert "2 of 2 units are measured" in Path(page).read_text()
    cache = Path(plan_merges(config)[0].run.store.path) / "merge_evidence"
    assert all(len(file.stem) == 64 for file in cache.glob("*.json"))
    assert any(cache.iterdir())


def test_the_record_of_a_selection_says_how_many_experts_supply_a_layer(opened: Opened, config: Config) -> None:
    unit = replace(next(unit for unit in plan_merges(config) if unit.method == "ties"), method="max_magnitude")
    measured = measure_unit(unit, opened, version=("c0ffee", False))
    assert measured.suppliers == opened.bench.merge("max_magnitude", Tuning(1.0)).suppliers
    assert parse_merge_unit(dump_merge_unit(measured), source="it").suppliers == measured.suppliers
