from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from safetydpo.diffusion.adapter import AdapterSlot
from safetydpo.diffusion.flux import Flux, pack_latents, picture_ids, unpack_latents
from tests.diffusion.tiny_models import build_model


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Flux:
    folder: Path = tmp_path_factory.mktemp("flux")
    build_model("flux-dev", folder)
    return Flux.from_folder(folder)


def test_one_patch_is_packed_channel_by_channel():
    """Two channels of 2 x 2: [[1, 2], [3, 4]] and [[5, 6], [7, 8]] become the one patch 1 ... 8."""
    latents = torch.arange(1.0, 9.0).reshape(1, 2, 2, 2)
    assert pack_latents(latents).tolist() == [[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]]]


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 6), (8, 2)])
def test_packing_equals_diffusers_and_comes_back(height: int, width: int):
    latents = torch.randn(3, 16, height, width, generator=torch.Generator().manual_seed(0))
    packed = pack_latents(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 3, 16, height, width))
    assert torch.equal(unpack_latents(packed, height=height, width=width), latents)
    theirs = FluxPipeline._prepare_latent_image_ids(3, height // 2, width // 2, "cpu", torch.float32)
    assert torch.equal(picture_ids(height // 2, width // 2), theirs)


def test_training_tells_the_default_guidance_and_a_condition_may_tell_another(dev: Flux):
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    condition, timesteps = dev.encode_prompts(["a red ball", "a dagger"]), torch.tensor([100, 900])
    default = dev.predict(latents, timesteps, condition)
    assert torch.equal(dev.predict(latents, timesteps, replace(condition, guidance=torch.full((2,), 3.5))), default)
    other = dev.predict(latents, timesteps, replace(condition, guidance=torch.tensor([3.5, 1.0])))
    assert torch.equal(other[0], default[0])
    assert not torch.equal(other[1], default[1])


def test_only_one_branch_is_computed_where_the_network_is_told_the_guidance(dev: Flux):
    sizes: list[int] = []
    handle = dev.network.register_forward_pre_hook(
        lambda _module, _inputs, named: sizes.append(len(named["hidden_states"])), with_kwargs=True
    )
    prompts, empty = dev.encode_prompts(["a red ball"]), dev.encode_prompts([""])
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    try:
        dev.sample(noise, prompts, empty=empty, steps=2, guidance_scale=3.0)
        own = replace(prompts, guidance=torch.tensor([3.0]))
        dev.sample(noise, own, empty=empty, steps=2, guidance_scale=2.0)
    finally:
        handle.remove()
    assert sizes == [1, 1, 2, 2]


def test_rank_4_on_flux_has_4669440_parameters():
    """19 double blocks with 4 maps and 38 single blocks with 3, all 3072 -> 3072: 190 * 4 * 6144 = 4,669,440.

    (The text side of a double block has projections of other names, which are no default targets.)
    """
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    shapes = list(AdapterSlot(transformer).shapes(("to_q", "to_k", "to_v", "to_out.0")))
    assert len(shapes) == 190
    assert sum(4 * (d_in + d_out) for _, (d_in, d_out) in shapes) == 4_669_440
