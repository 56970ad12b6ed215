"""What later stages build on the Backbone protocol, each as a small working example."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer, LoraSignature
from safetydpo.diffusion.adapter import initial_adapter
from safetydpo.diffusion.backbone import Condition, GuidanceStep
from safetydpo.diffusion.schedule import start_step_for_strength
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from tests.diffusion.models import Model

SIGNATURE = LoraSignature(rank=4, alpha=4.0, targets=("to_q", "to_k", "to_v", "to_out.0"))
PROMPTS = ["a red ball", "a drawing of a dagger"]
STEPS = 5


def draw_latents(model: Model, prompts: list[str], **arguments: object) -> Tensor:
    backbone = model.backbone
    return backbone.sample(
        model.noise(len(prompts)),
        backbone.encode_prompts(prompts),
        empty=backbone.encode_prompts([""]),
        steps=STEPS,
        guidance_scale=4.0,
        **arguments,
    )


def random_adapter(model: Model, *, size: float = 0.2, rank: int = 4) -> dict[str, LoraLayer]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: LoraLayer(
            down=torch.randn(rank, d_in, generator=generator) / d_in**0.5,
            up=size * torch.randn(d_out, rank, generator=generator),
        )
        for name, (d_in, d_out) in model.backbone.named_linear_layers(SIGNATURE.targets)
    }


def test_plain_combination_through_the_callback_changes_nothing(model: Model):
    plain = draw_latents(model, PROMPTS)
    through = draw_latents(
        model,
        PROMPTS,
        callback=lambda step: (
            step.predicted_empty + step.guidance_scale * (step.predicted_prompt - step.predicted_empty)
        ),
    )
    assert torch.equal(plain, through)


def test_sld_style_guidance_moves_the_picture_away_from_a_concept(model: Model):
    """Safe latent diffusion: subtract mu * s * (concept - empty) where prompt and concept point the same way."""
    concept = model.backbone.encode_prompts(["a bomb"])
    seen: list[int] = []

    def guide(step: GuidanceStep) -> Tensor:
        towards = step.predict(concept) - step.predicted_empty
        agree = (step.predicted_prompt - step.predicted_empty) * towards > 0
        seen.append(step.index)
        return step.combined - 0.5 * step.guidance_scale * towards * agree

    guided = draw_latents(model, PROMPTS, callback=guide)
    assert seen == list(range(STEPS))
    assert torch.isfinite(guided).all()
    pictures = model.backbone.decode(guided), model.backbone.decode(draw_latents(model, PROMPTS))
    assert (pictures[0].int() - pictures[1].int()).abs().float().mean() > 0.5


def test_sdedit_keeps_the_layout(model: Model):
    """A picture re-drawn from 30 % of the way stays closer to itself than one drawn from pure noise."""
    backbone, steps = model.backbone, 10
    ramp = torch.linspace(0, 255, model.size).round().to(torch.uint8)
    picture = ramp[None, :, None, None].expand(1, model.size, model.size, 3)
    clean = backbone.encode_images(picture)
    start = start_step_for_strength(0.3, steps=steps)
    timestep = torch.tensor([backbone.sampling_timesteps(steps)[start]])
    noisy = backbone.add_noise(clean, model.noise(1), timestep)
    prompts, empty = backbone.encode_prompts(PROMPTS[:1]), backbone.encode_prompts([""])
    arguments = {"empty": empty, "steps": steps, "guidance_scale": 2.0}
    edited = backbone.sample(noisy, prompts, start_step=start, **arguments)
    fresh = backbone.sample(model.noise(1), prompts, **arguments)
    assert (edited - clean).square().mean() < 0.5 * (fresh - clean).square().mean()
    assert not torch.equal(edited, clean)


def test_closed_form_edit_of_cross_attention_maps_one_prompt_to_another(model: Model):
    """UCE: W' = W (G S' + r I) (S S' + r I)^-1 gives tokens S the keys and values of tokens G; "" keeps its own."""
    backbone = model.backbone
    bomb, flower, empty = (backbone.encode_prompts([text]).tokens[0].double() for text in ("a bomb", "a flower", ""))
    source, goal = torch.cat([bomb, empty]), torch.cat([flower, empty])
    names = [name for name, _ in backbone.named_linear_layers(["attn2.to_k", "attn2.to_v"])]
    before, wanted = draw_latents(model, ["a bomb"]), draw_latents(model, ["a flower"])
    originals = {name: backbone.layer_weight(name).clone() for name in names}
    ridge = 1e-6 * torch.eye(source.shape[1], dtype=torch.float64)
    try:
        for name in names:
            moved = originals[name].double() @ (goal.T @ source + ridge)
            backbone.layer_weight(name).copy_(torch.linalg.solve(source.T @ source + ridge, moved, left=False))
        after = draw_latents(model, ["a bomb"])
    finally:
        for name in names:
            backbone.layer_weight(name).copy_(originals[name])
    ratio = (after - wanted).square().mean() / (before - wanted).square().mean()
    assert ratio < 0.01
    assert torch.equal(draw_latents(model, ["a bomb"]), before)


def test_layer_inputs_are_those_of_the_base_and_explain_the_outputs(model: Model):
    """Co-Merge's collection: y = W h (+ b) for the recorded h; with the adapter off, h is the base model's."""
    backbone = model.backbone
    names = [name for name, _ in backbone.named_linear_layers(["attn2.to_v", "attn1.to_q"])]
    condition, latents = backbone.encode_prompts(PROMPTS), model.noise(2)
    outputs: dict[str, Tensor] = {}
    handles = [
        backbone.network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: outputs.__setitem__(name, output)
        )
        for name in names
    ]
    with torch.no_grad(), backbone.layer_inputs(names) as inputs:
        for timestep in (900, 100):
            backbone.predict(latents, torch.full((2,), timestep), condition)
    for handle in handles:
        handle.remove()
    assert all(len(inputs[name]) == 2 for name in names)
    for name in names:
        assert torch.equal(inputs[name][1] @ backbone.layer_weight(name).T, outputs[name])
        if name.endswith("attn2.to_v"):
            assert torch.equal(inputs[name][0], condition.tokens)
    backbone.install_adapter(SIGNATURE)
    backbone.load_adapter(random_adapter(model))
    with torch.no_grad(), backbone.adapter_off(), backbone.layer_inputs(names) as again:
        backbone.predict(latents, torch.full((2,), 900), condition)
    backbone.predict(latents, torch.full((2,), 100), condition)
    assert all(len(again[name]) == 1 and torch.equal(again[name][0], inputs[name][0]) for name in names)


def test_gradient_with_respect_to_token_embeddings_equals_finite_differences(model: Model):
    """Central difference along a random direction, in float64: relative error below 1e-6."""
    backbone = StableDiffusion.from_folder(model.folder, dtype=torch.float64)
    latents, noise = model.noise(1).double(), model.noise(1, seed=1).double()
    embeddings = backbone.token_embedding_table()[backbone.tokenize(PROMPTS[:1])].clone().requires_grad_()

    def loss(given: Tensor) -> Tensor:
        prediction = backbone.predict(latents, torch.tensor([500]), backbone.encode_prompt_embeddings(given))
        return (prediction - noise).square().mean()

    (gradient,) = torch.autograd.grad(loss(embeddings), embeddings)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0
    direction = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        difference = (loss(embeddings + step * direction) - loss(embeddings - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)


def test_gradient_reaches_the_condition(model: Model):
    tokens = model.backbone.encode_prompts(PROMPTS[:1]).tokens.clone().requires_grad_()
    model.backbone.predict(model.noise(1), torch.tensor([500]), Condition(tokens)).square().mean().backward()
    assert tokens.grad is not None
    assert torch.isfinite(tokens.grad).all()
    assert tokens.grad.abs().max() > 0


def test_adapter_swap_scale_off_and_remove(model: Model):
    backbone = model.backbone
    base = draw_latents(model, PROMPTS)
    backbone.install_adapter(SIGNATURE)
    start = initial_adapter(
        backbone.named_linear_layers(SIGNATURE.targets),
        SIGNATURE,
        base_fingerprint=backbone.fingerprint,
        run_seed=0,
        init="shared",
        expert_name="any",
    )
    backbone.load_adapter(start)
    assert torch.equal(draw_latents(model, PROMPTS), base)
    layers = random_adapter(model)
    backbone.load_adapter(layers)
    changed = draw_latents(model, PROMPTS)
    assert not torch.equal(changed, base)
    backbone.load_adapter(layers, scale=0.5)
    half = draw_latents(model, PROMPTS)
    assert not torch.equal(half, changed)
    folded = backbone.export_adapter()
    backbone.load_adapter(random_adapter(model, rank=9))
    backbone.load_adapter(folded)
    assert torch.equal(draw_latents(model, PROMPTS), half)
    with backbone.adapter_off():
        assert torch.equal(draw_latents(model, PROMPTS), base)
    backbone.remove_adapter()
    assert torch.equal(draw_latents(model, PROMPTS), base)


def test_exported_adapter_draws_the_same_in_plain_diffusers(model: Model, load_pipeline, tmp_path: Path):
    backbone = model.backbone
    base = backbone.decode(draw_latents(model, PROMPTS))
    backbone.install_adapter(SIGNATURE)
    layers = random_adapter(model)
    name, other = sorted(layers)[0], random_adapter(model, rank=7)
    backbone.load_adapter(layers | {name: other[name]}, scale=0.8)
    ours = backbone.decode(draw_latents(model, PROMPTS))
    tensors = {}
    for module, layer in backbone.export_adapter().items():
        tensors[f"unet.{module}.lora_A.weight"] = layer.down.contiguous()
        tensors[f"unet.{module}.lora_B.weight"] = layer.up.contiguous()
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline = load_pipeline(model.folder)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    pictures = pipeline(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=4.0, latents=model.noise(2), output_type="np"
    ).images
    theirs = torch.from_numpy((pictures * 255).round()).int()
    assert (ours.int() - theirs).abs().max() <= 1
    assert (ours.int() - base.int()).abs().float().mean() > 1
