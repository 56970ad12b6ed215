from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safetydpo.baselines.conditions import name_lists, num_tokens
from safetydpo.baselines.esd import CROSS_ATTENTION, draw_points, trained_layers
from safetydpo.baselines.guidance import erasing_target
from safetydpo.baselines.intervention import Intervention, NegativePrompt, SafetyConcept
from safetydpo.baselines.protocol import Erasure
from safetydpo.baselines.registry import COMPARATORS
from safetydpo.baselines.uce import aligned_tokens, edited_rows
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.render import render
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.errors import SafetyDPOError, UsageError
from tests.baselines.conftest import ERASURE, SAMPLER

CHEAP: dict[str, dict[str, Any]] = {"esd": {"steps": 3, "rows_per_step": 2, "rank": 2}}


def prepare(name: str, backbone: Backbone, erasure: Erasure = ERASURE, **changes: Any) -> Intervention:
    comparator = COMPARATORS[name]
    return comparator.prepare(
        backbone,
        erasure,
        settings={**comparator.space.first[0], **CHEAP.get(name, {}), **changes},
        sampler=SAMPLER,
        generator=torch.Generator().manual_seed(0),
    )


def draw(backbone: Backbone, intervention: Intervention, *, prompts: tuple[str, ...] = ("a red bomb",)) -> Any:
    intervention.install(backbone)
    guided = intervention.guide(backbone)
    pictures = render(backbone, prompts=prompts, seeds=range(len(prompts)), sampler=SAMPLER, **guided)
    backbone.remove_adapter()
    return pictures


@pytest.mark.parametrize("name", COMPARATORS)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_it_changes_the_pictures_of_every_family_of_unets(families: dict[str, Backbone], family: str, name: str):
    backbone = families[family]
    intervention = prepare(name, backbone)
    assert not torch.equal(draw(backbone, intervention), draw(backbone, Intervention()))
    assert prepare(name, backbone).fingerprint == intervention.fingerprint


@pytest.mark.parametrize("name", COMPARATORS)
def test_with_nothing_to_remove_it_is_the_base(backbone: StableDiffusion, name: str):
    intervention = prepare(name, backbone, Erasure((), ERASURE.preserved))
    assert (intervention.layers, intervention.guiding) == ({}, None)
    assert torch.equal(draw(backbone, intervention), draw(backbone, Intervention()))


@pytest.mark.parametrize("name", COMPARATORS)
def test_it_takes_no_transformer(families: dict[str, Backbone], name: str):
    with pytest.raises(UsageError, match=f"expected a U-Net model .* for comparator '{name}', found a transformer"):
        prepare(name, families["sd3"])


@pytest.mark.parametrize("name", COMPARATORS)
def test_it_takes_no_settings_of_others(backbone: StableDiffusion, name: str):
    with pytest.raises(UsageError, match=f"of comparator '{name}', found 'other'"):
        prepare(name, backbone, other=1.0)


def test_names_are_listed_as_far_as_the_text_encoder_reads(backbone: StableDiffusion):
    """16 tokens, 14 of them for names and commas: a comma is one of its own."""
    names = ["bomb", "dagger", "house", "flower", "ball", "red", "blue", "green", "photo"]
    comma = num_tokens(backbone, ",")
    lists = name_lists(backbone, names, joined="list")
    assert ", ".join(lists).split(", ") == names
    assert len(lists) > 1
    for text in lists:
        members = text.split(", ")
        assert num_tokens(backbone, text) == sum(num_tokens(backbone, one) for one in members) + comma * (
            len(members) - 1
        )
        assert num_tokens(backbone, text) <= 14
    assert name_lists(backbone, names, joined="single") == tuple(names)


def test_one_concept_is_an_ordinary_negative_prompt(backbone: StableDiffusion):
    erasure = Erasure(ERASURE.concepts[:1])
    assert prepare("negative_prompt", backbone, erasure).guiding == NegativePrompt(("bomb",), 1.0)


def test_the_warm_up_is_a_share_of_the_steps(backbone: StableDiffusion):
    """0.4 of 3 steps are 1.2, which is rounded to 1."""
    guiding = prepare("sld", backbone, warmup_rate=0.4).guiding
    assert isinstance(guiding, SafetyConcept)
    assert (guiding.warmup_steps, guiding.texts) == (1, ("bomb, dagger",))


def test_uce_makes_keys_and_values_see_the_target(backbone: StableDiffusion):
    """With hardly any ridge and nothing to preserve, W* c is W t for every edited token."""
    erasure = Erasure(ERASURE.concepts[1:])
    layers = prepare("uce", backbone, erasure, ridge=0.01, erase_scale=10.0, preserve_scale=0.01).layers
    erased, targets = edited_rows(backbone, erasure.concepts[0].prompts, erasure.concepts[0].safe_prompts)
    assert set(layers) == {name for name, _ in backbone.named_linear_layers(("attn2.to_k", "attn2.to_v"))}
    for name, layer in layers.items():
        weight = backbone.layer_weight(name)
        before = (erased @ weight.T - targets @ weight.T).norm()
        after = (erased @ (weight + layer.up @ layer.down).T - targets @ weight.T).norm()
        assert after < 0.05 * before


def test_uce_keeps_what_it_is_told_to_keep(backbone: StableDiffusion):
    features = backbone.encode_prompts(["a blue house"]).tokens[0]

    def moved(preserve_scale: float) -> float:
        layers = prepare("uce", backbone, preserve_scale=preserve_scale, ridge=0.01).layers
        return sum(float((features @ layer.down.T @ layer.up.T).norm()) for layer in layers.values())

    assert moved(10.0) < 0.5 * moved(0.01)


def test_tokens_are_paired_from_the_end_of_the_texts():
    """0 starts, 9 ends and pads. `a big bomb .` against `a ball .`: they differ from position 2 on."""
    unsafe, safe = torch.tensor([0, 1, 5, 6, 4, 9, 9]), torch.tensor([0, 1, 7, 4, 9, 9, 9])
    assert aligned_tokens(unsafe, safe, end=9) == [(2, 2), (3, 2), (4, 3), (5, 4), (6, 5)]
    assert aligned_tokens(safe, unsafe, end=9) == [(2, 3), (3, 4), (4, 5), (5, 6), (6, 6)]
    assert aligned_tokens(unsafe, unsafe, end=9) == []
    empty = torch.tensor([0, 9, 9, 9, 9, 9, 9])
    assert aligned_tokens(safe, empty, end=9) == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 3)]


def test_the_layers_of_esd(backbone: StableDiffusion):
    cross, others = trained_layers(backbone, "x"), trained_layers(backbone, "u")
    assert cross == tuple(sorted(name for name, _ in backbone.named_linear_layers(CROSS_ATTENTION)))
    assert not set(cross) & set(others)
    assert any(".attn1.to_q" in name for name in others)
    assert not any("attn2" in name or name.startswith("time_embedding") for name in others)
    assert set(prepare("esd", backbone).layers) == set(cross)
    assert set(prepare("esd", backbone, layers="u").layers) == set(others)


def test_esd_comes_nearer_to_its_target(backbone: StableDiffusion):
    """The error against `eps_0 - eta (eps_p - eps_0)` of the base, at points that the base itself samples."""
    prompts = [text for concept in ERASURE.concepts for text in concept.prompts]
    points = draw_points(backbone, prompts, sampler=SAMPLER, num_pictures=4, generator=torch.Generator().manual_seed(1))
    assert points.timesteps.tolist() == [time for time in backbone.sampling_timesteps(3) for _ in range(4)]
    condition = backbone.encode_prompts([prompts[int(index)] for index in points.prompts])
    empty = backbone.encode_prompts([""]).expand(len(points.timesteps))

    @torch.no_grad()
    def predict(which: Any) -> torch.Tensor:
        return backbone.predict(points.latents, points.timesteps, which)

    target = erasing_target(predict(empty), predict(condition), negative_guidance=1.0)
    before = float((predict(condition) - target).square().mean())
    prepare("esd", backbone, steps=40, learning_rate=1e-2, rank=4, rows_per_step=4).install(backbone)
    after = float((predict(condition) - target).square().mean())
    assert after < 0.7 * before


def test_esd_stops_at_a_loss_that_is_not_finite(tiny_folder: Path):
    backbone = StableDiffusion.from_folder(tiny_folder)
    with torch.no_grad():
        backbone.layer_weight(trained_layers(backbone, "u")[0]).fill_(float("nan"))
    with pytest.raises(SafetyDPOError, match="expected a finite loss of ESD, found nan in step 0: lower its"):
        prepare("esd", backbone)
    assert not hasattr(backbone.network, "peft_config")
