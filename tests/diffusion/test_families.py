"""What the Backbone protocol promises, for every family, on tiny random networks of the true classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FluxPipeline
from safetensors.torch import load_file
from torch import Tensor

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, LoraSignature, write_adapter
from safetydpo.artifacts.storage import open_location
from safetydpo.config.schema import BaseModelConfig, SamplerConfig
from safetydpo.diffusion.adapter import initial_adapter
from safetydpo.diffusion.backbone import Backbone, Condition, GuidanceStep
from safetydpo.diffusion.build import (
    PATCHES,
    base_fingerprint,
    check_picture_size,
    check_targets,
    embeds_guidance,
    load_backbone,
)
from safetydpo.diffusion.folder import read_json
from safetydpo.diffusion.render import render
from safetydpo.errors import SafetyDPOError, UsageError
from tests.diffusion.tiny_models import FAMILIES, SIZE, build_model
from tests.tiny import MAX_TOKENS

PROMPTS = ["a red ball on a house", "a drawing of a dagger"]
SIGNATURE = LoraSignature(rank=4, alpha=4.0, targets=("to_q", "to_k", "to_v", "to_out.0"))
STEPS = 5


@dataclass(frozen=True)
class Case:
    name: str
    folder: Path
    backbone: Backbone

    @property
    def is_flux(self) -> bool:
        return self.name.startswith("flux")

    @property
    def is_flow(self) -> bool:
        return self.backbone.prediction_type == "flow"

    def noise(self, *, seed: int = 0, num_rows: int = 2) -> Tensor:
        shape = self.backbone.latent_shape(height=SIZE, width=SIZE)
        return torch.randn(num_rows, *shape, generator=torch.Generator().manual_seed(seed))

    def draw(self, prompts: Condition | None = None, *, negative: str = "", scale: float = 4.0, **more: Any) -> Tensor:
        prompts = self.backbone.encode_prompts(PROMPTS) if prompts is None else prompts
        empty = self.backbone.encode_prompts([negative] * len(PROMPTS))
        noise = more.pop("noise", self.noise())
        return self.backbone.sample(noise, prompts, empty=empty, steps=STEPS, guidance_scale=scale, **more)

    def random_adapter(self, *, seed: int = 1) -> dict[str, LoraLayer]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: LoraLayer(
                down=torch.randn(4, d_in, generator=generator) / d_in**0.5,
                up=0.2 * torch.randn(d_out, 4, generator=generator),
            )
            for name, (d_in, d_out) in self.backbone.named_linear_layers(SIGNATURE.targets)
        }


@pytest.fixture(scope="module", params=FAMILIES)
def _loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    build_model(request.param, folder)
    return Case(request.param, folder, load_backbone(BaseModelConfig(model=str(folder))))


@pytest.fixture
def case(_loaded: Case) -> Case:
    _loaded.backbone.remove_adapter()
    return _loaded


def load_plain_pipeline(case: Case) -> Any:
    """Load a folder with plain diffusers, set to the solver that we sample with."""
    pipeline = DiffusionPipeline.from_pretrained(case.folder)
    if not case.is_flow:
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def load_pipeline() -> Callable[[Case], Any]:
    return load_plain_pipeline


def draw_with_pipeline(case: Case, pipeline: Any, *, negative: str | None, scale: float, **more: Any) -> Tensor:
    """Return the latents of diffusers' own call on `case.noise()`; for FLUX, `more` says which guidance is meant."""
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "output_type": "latent"}
    noise = case.noise()
    if case.is_flow:
        arguments["max_sequence_length"] = MAX_TOKENS
    if case.is_flux:
        noise = FluxPipeline._pack_latents(noise, *noise.shape)
    if negative is not None:
        arguments["negative_prompt"] = [negative] * len(PROMPTS)
    found = pipeline(PROMPTS, latents=noise, guidance_scale=scale, **arguments | more).images
    return FluxPipeline._unpack_latents(found, SIZE, SIZE, 4) if case.is_flux else found


def test_sampling_equals_the_pipelines_own_call(case: Case, load_pipeline):
    """Same initial latents, steps and guidance, float32: largest difference seen 0.0, for every family.

    FLUX.1 dev is told the scale; schnell is drawn without guidance, as both were made for.
    """
    scale = 1.0 if case.name == "flux-schnell" else 4.0
    theirs = draw_with_pipeline(case, load_pipeline(case), negative=None, scale=scale)
    ours = case.draw(scale=scale)
    assert theirs.abs().max() > 1.0
    assert float((ours - theirs).abs().max()) == 0.0


def test_sampling_with_a_negative_prompt_equals_the_pipelines_own_call(case: Case, load_pipeline):
    """Largest difference seen: 0.0; with FLUX.1, whose pipeline calls the network once per branch and we once, 2.6e-6.

    The latents are of size 2 to 30.
    """
    pipeline, negative = load_pipeline(case), "a green flower"
    if case.is_flux:
        theirs = draw_with_pipeline(case, pipeline, negative=negative, scale=4.0, true_cfg_scale=2.5)
        prompts = case.backbone.encode_prompts(PROMPTS)
        if case.backbone.guidance_is_embedded:
            prompts = replace(prompts, guidance=torch.full((2,), 4.0))
        ours = case.draw(prompts, negative=negative, scale=2.5)
    else:
        theirs = draw_with_pipeline(case, pipeline, negative=negative, scale=4.0)
        ours = case.draw(negative=negative)
    assert float((ours - theirs).abs().max()) <= (5e-6 if case.is_flux else 0.0)
    assert (ours - case.draw(scale=2.5 if case.is_flux else 4.0)).abs().max() > 0.1


def test_prompts_change_the_picture_and_rows_stay_their_own(case: Case):
    both = case.draw(scale=2.0)
    swapped = case.draw(case.backbone.encode_prompts(PROMPTS[::-1]), scale=2.0, noise=case.noise().flip(0)).flip(0)
    torch.testing.assert_close(both, swapped, rtol=1e-4, atol=1e-4)
    other = case.draw(case.backbone.encode_prompts(["a blue flower", "a photo"]), scale=2.0)
    assert (both - other).abs().amax(dim=(1, 2, 3)).min() > 0.05


def test_plain_combination_through_the_callback_changes_nothing(case: Case):
    seen: list[tuple[int, float]] = []

    def combine(step: GuidanceStep) -> Tensor:
        seen.append((step.index, step.timestep))
        return step.combined

    plain, through = case.draw(), case.draw(callback=combine)
    torch.testing.assert_close(through, plain, rtol=1e-5, atol=1e-5)
    shape = case.backbone.latent_shape(height=SIZE, width=SIZE)
    assert [index for index, _ in seen] == list(range(STEPS))
    wanted = list(case.backbone.sampling_timesteps(STEPS, latent_shape=shape))
    assert [time for _, time in seen] == pytest.approx(wanted)
    assert wanted == sorted(wanted, reverse=True)
    assert 0 <= wanted[-1] <= wanted[0] <= case.backbone.num_train_timesteps - 1


def test_a_callback_may_ask_for_another_condition(case: Case):
    concept = case.backbone.encode_prompts(["a bomb"])

    def away(step: GuidanceStep) -> Tensor:
        return step.combined - 0.5 * (step.predict(concept) - step.predicted_empty)

    guided = case.draw(callback=away)
    assert torch.isfinite(guided).all()
    assert (guided - case.draw()).abs().max() > 0.05


def test_a_later_start_goes_on_from_the_noise_of_its_step(case: Case):
    """SDEdit: the solver's own state at step s is what `add_noise` at `sampling_timesteps[s]` describes."""
    backbone, start = case.backbone, 3
    shape = backbone.latent_shape(height=SIZE, width=SIZE)
    timestep = torch.tensor([backbone.sampling_timesteps(STEPS, latent_shape=shape)[start]] * 2)
    clean, noise = case.noise(seed=3), case.noise(seed=4)
    noisy = backbone.add_noise(clean, noise, timestep)
    if case.is_flow:
        sigma = backbone._process.solver(STEPS, num_patches=16).sigmas[start]  # type: ignore[attr-defined]
        torch.testing.assert_close(noisy, (1 - sigma) * clean + sigma * noise, rtol=1e-5, atol=1e-6)
    edited = case.draw(noise=noisy, start_step=start)
    assert (edited - clean).square().mean() < (case.draw() - clean).square().mean()
    with pytest.raises(SafetyDPOError, match=f"expected a start step from 0 to {STEPS - 1}, found {STEPS}"):
        case.draw(start_step=STEPS)


def test_target_noise_and_epsilon_fit_together(case: Case):
    backbone, timesteps = case.backbone, torch.tensor([10, 900])
    latents, noise = case.noise(), case.noise(seed=1)
    noisy = backbone.add_noise(latents, noise, timesteps)
    target = backbone.target(latents, noise, timesteps)
    torch.testing.assert_close(backbone.to_epsilon(target, noisy, timesteps), noise, rtol=1e-4, atol=1e-4)
    assert torch.equal(backbone.target(latents, noise, timesteps, kind="epsilon"), noise)
    weights = backbone.velocity_weights(timesteps)
    assert (weights == 1).all() == (backbone.prediction_type != "epsilon")
    low, high = backbone.min_snr_weights(timesteps, gamma=5.0).tolist()
    assert 0 < low < 1
    assert (high == 1.0) == (backbone.prediction_type == "epsilon")
    prediction = backbone.predict(noisy, timesteps, backbone.encode_prompts(PROMPTS))
    assert prediction.shape == latents.shape


def test_latents_are_shifted_and_scaled_and_come_back(case: Case):
    """The posterior mean m is stored as (m - shift) * scale; decoding undoes it."""
    vae = case.backbone._parts.vae  # type: ignore[attr-defined]
    pictures = torch.randint(0, 256, (2, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        mean = vae.encode(pictures.permute(0, 3, 1, 2) / 255.0 * 2.0 - 1.0).latent_dist.mean
        decoded = vae.decode(mean).sample
    shift = vae.config.shift_factor or 0.0
    latents = case.backbone.encode_images(pictures)
    torch.testing.assert_close(latents, (mean - shift) * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)
    levels = ((decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
    assert (case.backbone.decode(latents).int() - levels.int()).abs().max() <= 1


def test_given_input_embeddings_are_encoded_like_their_tokens(case: Case):
    backbone = case.backbone
    ids = backbone.tokenize(PROMPTS)
    given = backbone.encode_prompt_embeddings(backbone.token_embedding_table()[ids], ids=ids)
    wanted = backbone.encode_prompts(PROMPTS)
    assert torch.equal(given.tokens, wanted.tokens)
    assert (given.pooled is None) == (wanted.pooled is None) == (case.name in ("sd1", "sd2"))
    if given.pooled is not None and wanted.pooled is not None:
        assert torch.equal(given.pooled, wanted.pooled)
        with pytest.raises(SafetyDPOError, match=r"expected the token ids .* found none: give ids=tokenize\(texts\)"):
            backbone.encode_prompt_embeddings(backbone.token_embedding_table()[ids])
    with pytest.raises(SafetyDPOError, match=r"expected input embeddings of 16.* tokens, found 3: use"):
        backbone.encode_prompt_embeddings(torch.zeros(1, 3, 4))


def test_gradients_reach_the_input_embeddings_of_every_text_encoder(case: Case):
    """And equal central differences along a random direction, in float64, to 1e-5 of their size."""
    backbone = load_backbone(BaseModelConfig(model=str(case.folder)))
    for network in (backbone.network, *(tower._encoder for tower in backbone._towers)):  # type: ignore[attr-defined]
        network.double()
    backbone._dtype = torch.float64  # type: ignore[attr-defined]
    latents, ids = case.noise(num_rows=1).double(), backbone.tokenize(PROMPTS[:1])
    embeddings = backbone.token_embedding_table()[ids].clone().requires_grad_()

    def loss(given: Tensor) -> Tensor:
        condition = backbone.encode_prompt_embeddings(given, ids=ids)
        return backbone.predict(latents, torch.tensor([500]), condition).square().mean()

    (gradient,) = torch.autograd.grad(loss(embeddings), embeddings)
    for part in gradient.split([tower.num_tokens for tower in backbone._towers], dim=1):  # type: ignore[attr-defined]
        assert part.abs().max() > 0
    direction = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # Root-mean-square norms compute in float32 whatever they are given, which is noise in small differences.
    step = 1e-3 if case.is_flow else 1e-5
    with torch.no_grad():
        difference = (loss(embeddings + step * direction) - loss(embeddings - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-5)


def test_adapter_swap_scale_off_export_and_remove(case: Case):
    backbone = case.backbone
    base = case.draw()
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
    assert torch.equal(case.draw(), base)
    layers = case.random_adapter()
    backbone.load_adapter(layers, scale=0.5)
    half = case.draw()
    assert not torch.equal(half, base)
    folded = backbone.export_adapter()
    backbone.swap_adapter(SIGNATURE, case.random_adapter(seed=2))
    assert not torch.equal(case.draw(), half)
    backbone.swap_adapter(SIGNATURE, folded)
    assert torch.equal(case.draw(), half)
    with backbone.adapter_off():
        assert torch.equal(case.draw(), base)
    backbone.remove_adapter()
    assert torch.equal(case.draw(), base)


def test_the_exported_file_draws_the_same_in_plain_diffusers(case: Case, load_pipeline, tmp_path: Path):
    """`pipeline.load_lora_weights(folder)` of plain diffusers: largest difference of latents seen 0.0, every family."""
    backbone = case.backbone
    scale = 1.0 if case.name == "flux-schnell" else 4.0
    base = case.draw(scale=scale)
    backbone.swap_adapter(SIGNATURE, case.random_adapter())
    ours = case.draw(scale=scale)
    name = "pytorch_lora_weights.safetensors"
    metadata = AdapterMetadata(denoiser=backbone.denoiser)
    write_adapter(open_location(str(tmp_path)) / name, backbone.export_adapter(), metadata=metadata)
    assert all(key.startswith(f"{backbone.denoiser}.") for key in load_file(tmp_path / name))
    pipeline = load_pipeline(case)
    pipeline.load_lora_weights(tmp_path, weight_name=name)
    theirs = draw_with_pipeline(case, pipeline, negative=None, scale=scale)
    assert float((ours - theirs).abs().max()) == 0.0
    assert (ours - base).abs().max() > 0.05


def test_layer_inputs_explain_the_outputs(case: Case):
    """y = W h + b for the recorded h of every LoRA target."""
    backbone = case.backbone
    names = [name for name, _ in backbone.named_linear_layers(SIGNATURE.targets)]
    outputs: dict[str, Tensor] = {}
    modules = {name: backbone.network.get_submodule(name) for name in names}
    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: outputs.__setitem__(name, output))
        for name, module in modules.items()
    ]
    with torch.no_grad(), backbone.layer_inputs(names) as inputs:
        backbone.predict(case.noise(), torch.tensor([500, 500]), backbone.encode_prompts(PROMPTS))
    for handle in handles:
        handle.remove()
    for name in names:
        (given,) = inputs[name]
        found = torch.nn.functional.linear(given, backbone.layer_weight(name), modules[name].bias)
        assert torch.equal(found, outputs[name])
    expected = pytest.raises(SafetyDPOError, match=f"name of a module of the {backbone.denoiser}, found 'nope'")
    with expected, backbone.layer_inputs(["nope"]):
        pass


def test_files_tell_fingerprint_and_targets_without_loading(case: Case):
    base = BaseModelConfig(model=str(case.folder))
    assert base_fingerprint(base) == case.backbone.fingerprint
    check_targets(base, SIGNATURE.targets)


def test_half_precision_base_keeps_float32_latents_and_adapter(case: Case):
    """bfloat16 networks: latents stay float32 between steps; the picture is near that of float32."""
    backbone = load_backbone(BaseModelConfig(model=str(case.folder), dtype="bfloat16"))
    backbone.install_adapter(SIGNATURE)
    assert {tensor.dtype for _, tensor in backbone.adapter_parameters()} == {torch.float32}
    half = replace(case, backbone=backbone)
    latents, condition = half.noise(), backbone.encode_prompts(PROMPTS)
    prediction = backbone.predict(latents, torch.tensor([500, 500]), condition)
    assert prediction.dtype == condition.tokens.dtype == torch.bfloat16
    drawn, exact = half.draw(scale=1.0), case.draw(scale=1.0)
    assert drawn.dtype == torch.float32
    # 8 bits of mantissa, five steps: seen 0.0017 (SDXL) to 0.015 (FLUX.1 dev) of the size of the latents.
    assert (drawn - exact).square().mean().sqrt() < 0.03 * exact.square().mean().sqrt()
    assert backbone.decode(drawn).shape == (2, SIZE, SIZE, 3)


def test_rendering_does_not_depend_on_position_or_neighbours(case: Case):
    sampler = SamplerConfig(steps=2, guidance_scale=2.0, height=SIZE, width=SIZE, batch_size=2)
    pictures = render(case.backbone, prompts=[*PROMPTS, "a photo"], seeds=[1, 2, 3], sampler=sampler)
    again = render(case.backbone, prompts=["a photo", PROMPTS[1]], seeds=[3, 2], sampler=sampler)
    assert torch.equal(pictures[2], again[0])
    assert torch.equal(pictures[1], again[1])
    if case.backbone.guidance_is_embedded:
        with pytest.raises(SafetyDPOError, match=r"unguided branch for 1 negative prompts, found one that") as seen:
            render(case.backbone, prompts=PROMPTS, seeds=[1, 2], sampler=sampler, negative_prompt="a bomb")
        assert "bomb" not in str(seen.value), "errors are logged and stored: no prompt has a place there"


def test_what_is_told_of_a_model_without_loading_it_is_so(case: Case):
    base = BaseModelConfig(model=str(case.folder))
    assert embeds_guidance(base) == case.backbone.guidance_is_embedded
    assert PATCHES.get(str(read_json(case.folder / "model_index.json")["_class_name"]), 1) == case.backbone.patch
    factor = 8 if case.is_flow else 4
    check_picture_size(base, height=SIZE, width=SIZE + factor)
    with pytest.raises(
        UsageError, match=rf"multiples of {factor} for base\.model .*, found 32 x {SIZE + factor // 2}: c"
    ):
        check_picture_size(base, height=SIZE, width=SIZE + factor // 2)


def test_sides_of_pictures_must_fit_the_patches(case: Case):
    factor = 8 if case.is_flow else 4
    with pytest.raises(SafetyDPOError, match=f"multiples of {factor}, found 32 x {32 + factor // 2}: change sampler"):
        case.backbone.latent_shape(height=32, width=32 + factor // 2)


def test_conditions_of_a_family_are_selected_joined_and_repeated_whole(case: Case):
    condition: Condition = case.backbone.encode_prompts(PROMPTS)
    again = condition.select(torch.tensor([0])).followed_by(condition.select(torch.tensor([1])))
    found: Mapping[str, Any] = vars(again)
    for name, value in vars(condition).items():
        assert (value is None) == (found[name] is None)
        assert value is None or torch.equal(value, found[name])
