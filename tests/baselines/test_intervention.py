from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer
from safetydpo.artifacts.layout import ADAPTER_FILE, INTERVENTION_FILE
from safetydpo.artifacts.storage import Location
from safetydpo.baselines.intervention import (
    Intervention,
    NegativePrompt,
    SafetyConcept,
    read_intervention,
    write_intervention,
)
from safetydpo.diffusion.render import initial_noise, render
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.errors import SafetyDPOError
from tests.baselines.conftest import SAMPLER

PROMPTS = ["a red bomb", "a blue house", "a drawing of a dagger"]
SEEDS = [1, 2, 3]
SLD = SafetyConcept(("bomb",), scale=3.0, warmup_steps=1, threshold=0.1, momentum_scale=0.3, momentum_beta=0.4)
METADATA = AdapterMetadata(base_fingerprint="f" * 64, kind="comparator")


def draw(backbone: StableDiffusion, **guided: Any) -> torch.Tensor:
    return render(backbone, prompts=PROMPTS, seeds=SEEDS, sampler=SAMPLER, **guided)


def pipeline_of(cls: Any, folder: Path) -> Any:
    pipeline = cls.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by(pipeline: Any, backbone: StableDiffusion, **options: Any) -> torch.Tensor:
    shape = backbone.latent_shape(height=32, width=32)
    found = pipeline(
        PROMPTS,
        latents=initial_noise(SEEDS, shape=shape),
        num_inference_steps=SAMPLER.steps,
        guidance_scale=SAMPLER.guidance_scale,
        output_type="np",
        **options,
    )
    return torch.from_numpy(found.images * 255).round().to(torch.uint8)


def furthest(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


def test_a_negative_prompt_draws_what_diffusers_draws_with_it(backbone: StableDiffusion, tiny_folder: Path):
    guided = Intervention(guiding=NegativePrompt(("a bomb",))).guide(backbone)
    ours = draw(backbone, **guided)
    theirs = drawn_by(pipeline_of(StableDiffusionPipeline, tiny_folder), backbone, negative_prompt=["a bomb"] * 3)
    assert furthest(ours, theirs) <= 1
    assert furthest(ours, draw(backbone)) > 1
    assert torch.equal(ours, draw(backbone, negative_prompt="a bomb"))


def test_the_weight_of_a_negative_prompt_starts_at_the_empty_prompt(backbone: StableDiffusion):
    plain = draw(backbone)
    distances = []
    for weight in (0.0, 0.5, 1.0):
        guided = Intervention(guiding=NegativePrompt(("a bomb", "a dagger"), weight)).guide(backbone)
        distances.append(float((draw(backbone, **guided).float() - plain.float()).abs().mean()))
    assert distances[0] == 0.0
    assert 0.0 < distances[1] < distances[2]


def test_safe_latent_guidance_draws_what_diffusers_draws(backbone: StableDiffusion, tiny_folder: Path):
    from diffusers import StableDiffusionPipelineSafe

    pipeline = pipeline_of(StableDiffusionPipelineSafe, tiny_folder)
    pipeline.safety_concept = "bomb"
    theirs = drawn_by(
        pipeline,
        backbone,
        sld_guidance_scale=SLD.scale,
        sld_warmup_steps=SLD.warmup_steps,
        sld_threshold=SLD.threshold,
        sld_momentum_scale=SLD.momentum_scale,
        sld_mom_beta=SLD.momentum_beta,
    )
    ours = draw(backbone, **Intervention(guiding=SLD).guide(backbone))
    assert furthest(ours, theirs) <= 1
    assert furthest(ours, draw(backbone)) > 1


def test_safe_latent_guidance_of_scale_0_is_plain_guidance(backbone: StableDiffusion):
    guided = Intervention(guiding=replace(SLD, scale=0.0, warmup_steps=0)).guide(backbone)
    assert torch.equal(draw(backbone, **guided), draw(backbone))
    always_warm = Intervention(guiding=replace(SLD, warmup_steps=SAMPLER.steps)).guide(backbone)
    assert torch.equal(draw(backbone, **always_warm), draw(backbone))


def test_its_momentum_starts_anew_with_every_batch(backbone: StableDiffusion):
    """A picture's bytes do not depend on the batch before; one step leaves no later index to tell two batches apart."""
    for steps in (3, 1):
        sampler = SAMPLER.model_copy(update={"steps": steps})
        guided = Intervention(guiding=replace(SLD, warmup_steps=0)).guide(backbone)
        together = render(backbone, prompts=PROMPTS, seeds=SEEDS, sampler=sampler, **guided)
        alone = render(backbone, prompts=PROMPTS[2:], seeds=SEEDS[2:], sampler=sampler, **guided)
        assert torch.equal(alone[0], together[2])


def test_a_change_of_weights_is_put_in_and_taken_out(backbone: StableDiffusion):
    name, (d_in, d_out) = next(iter(backbone.named_linear_layers(["attn2.to_k"])))
    generator = torch.Generator().manual_seed(0)
    layer = LoraLayer(torch.randn(3, d_in, generator=generator), torch.randn(d_out, 3, generator=generator))
    plain = draw(backbone)
    Intervention({name: layer}).install(backbone)
    changed = draw(backbone)
    assert furthest(changed, plain) > 1
    Intervention().install(backbone)
    assert torch.equal(draw(backbone), plain)


@pytest.mark.parametrize(
    "intervention",
    [
        Intervention(),
        Intervention(guiding=NegativePrompt(("bomb, dagger", "knife"), 0.5)),
        Intervention(guiding=SLD),
        Intervention({"mid.attn2.to_k": LoraLayer(torch.ones(2, 4), torch.ones(3, 2))}),
    ],
    ids=["base", "negative_prompt", "sld", "weights"],
)
def test_it_comes_back_from_its_files(store: Location, intervention: Intervention):
    write_intervention(store, intervention, metadata=METADATA)
    found = read_intervention(store)
    assert found.guiding == intervention.guiding
    assert found.fingerprint == intervention.fingerprint
    assert (store / ADAPTER_FILE).is_file() == bool(intervention.layers)


def test_every_part_is_in_the_fingerprint():
    layer = LoraLayer(torch.ones(2, 4), torch.ones(3, 2))
    different = [
        Intervention(),
        Intervention(guiding=SLD),
        Intervention(guiding=replace(SLD, scale=4.0)),
        Intervention(guiding=NegativePrompt(("bomb",))),
        Intervention({"k": layer}),
        Intervention({"k": layer}, NegativePrompt(("bomb",))),
    ]
    assert len({one.fingerprint for one in different}) == len(different)


@pytest.mark.parametrize(
    "content",
    [
        b"no JSON",
        b"[]",
        json.dumps({"schema": 2, "guiding": None, "has_layers": False}).encode(),
        json.dumps({"schema": 1, "guiding": {"kind": "other", "texts": []}, "has_layers": False}).encode(),
        json.dumps({"schema": 1, "guiding": {"kind": "negative_prompt"}, "has_layers": False}).encode(),
    ],
)
def test_other_files_are_refused(store: Location, content: bytes):
    (store / INTERVENTION_FILE).write_bytes(content)
    with pytest.raises(SafetyDPOError, match="expected an intervention at .*intervention.json, found something else"):
        read_intervention(store)


def test_a_missing_adapter_is_refused(store: Location):
    content = {"schema": 1, "guiding": None, "has_layers": True}
    (store / INTERVENTION_FILE).write_bytes(json.dumps(content).encode())
    with pytest.raises(SafetyDPOError, match="pytorch_lora_weights.safetensors"):
        read_intervention(store)
