from __future__ import annotations

import warnings

import pytest
import torch

from safetydpo.artifacts.adapters import LoraLayer, LoraSignature
from safetydpo.config.schema import SamplerConfig
from safetydpo.diffusion.pictures import encode_picture
from safetydpo.diffusion.render import initial_noise, render
from safetydpo.errors import SafetyDPOError
from tests.diffusion.models import Model

PROMPTS = ["a red ball", "a drawing of a dagger", "a bomb on a house", "a blue flower", "a photo of a house"]
SEEDS = [11, 2**62 + 1, 13, 14, 15]


def sampler(model: Model, *, batch_size: int) -> SamplerConfig:
    return SamplerConfig(steps=3, guidance_scale=4.0, height=model.size, width=model.size, batch_size=batch_size)


def test_bytes_of_a_row_do_not_depend_on_neighbours_or_position(model: Model):
    settings = sampler(model, batch_size=3)
    pictures = render(model.backbone, prompts=PROMPTS, seeds=SEEDS, sampler=settings)
    assert pictures.shape == (5, model.size, model.size, 3)
    for order in ([4, 2, 0, 1, 3], [3, 3, 1, 4, 0, 2, 2]):
        again = render(
            model.backbone,
            prompts=[PROMPTS[row] for row in order],
            seeds=[SEEDS[row] for row in order],
            sampler=settings,
        )
        for place, row in enumerate(order):
            assert encode_picture(again[place]) == encode_picture(pictures[row])
    alone = render(model.backbone, prompts=PROMPTS[1:2], seeds=SEEDS[1:2], sampler=settings)
    assert torch.equal(alone[0], pictures[1])


def test_prompt_seed_and_negative_prompt_matter(model: Model):
    settings = sampler(model, batch_size=2)
    one = {"prompts": PROMPTS[:1], "seeds": [1], "sampler": settings}
    plain = render(model.backbone, **one)
    for change in ({"prompts": PROMPTS[1:2]}, {"seeds": [2]}, {"negative_prompt": "a green flower"}):
        assert not torch.equal(plain, render(model.backbone, **(one | change)))


def test_noise_of_a_row_is_drawn_from_its_own_seed():
    noise = initial_noise([5, 9], shape=(4, 8, 8))
    assert torch.equal(noise[1], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(9)))
    assert torch.equal(initial_noise([9, 5], shape=(4, 8, 8))[0], noise[1])


def test_nothing_to_draw_gives_no_pictures(model: Model):
    assert render(model.backbone, prompts=[], seeds=[], sampler=sampler(model, batch_size=2)).shape == (
        0,
        model.size,
        model.size,
        3,
    )


def test_unequal_numbers_of_prompts_and_seeds_are_refused(model: Model):
    with pytest.raises(SafetyDPOError, match="expected one seed per prompt, found 2 prompts and 1 seeds"):
        render(model.backbone, prompts=PROMPTS[:2], seeds=[1], sampler=sampler(model, batch_size=2))


def test_global_settings_are_left_as_they_were(model: Model):
    assert not torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        render(model.backbone, prompts=PROMPTS[:1], seeds=[1], sampler=sampler(model, batch_size=1))
    assert torch.equal(torch.rand(2), expected)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_other_batch_sizes_change_the_last_bits_only(model: Model, batch_size: int):
    """Across batch sizes: at most 2 of 255 levels, and at most 0.1 % of all values differ at all."""
    names = ("a cat", "a red ball", "a bomb")
    prompts = [f"{name} on {colour}" for name in names for colour in ("blue", "white", "pink", "gray")]
    rows = {"prompts": prompts, "seeds": list(range(12))}
    settings = sampler(model, batch_size=16).model_copy(update={"steps": 8})
    reference = render(model.backbone, **rows, sampler=settings)
    other = render(model.backbone, **rows, sampler=settings.model_copy(update={"batch_size": batch_size}))
    difference = (reference.int() - other.int()).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() <= 0.001


def test_pictures_of_a_fused_adapter_are_nearly_the_others_and_the_base_comes_back(model: Model):
    """At most 1 of 256 levels apart, and not the base's; drawn again with the slot, equal to before."""
    backbone = model.backbone
    plain = sampler(model, batch_size=3)
    fused = plain.model_copy(update={"fused": True})

    def draw(settings: SamplerConfig) -> torch.Tensor:
        return render(backbone, prompts=PROMPTS[:3], seeds=SEEDS[:3], sampler=settings).int()

    base = draw(plain)
    assert torch.equal(draw(fused), base)
    signature = LoraSignature(rank=2, alpha=2.0, targets=("to_q", "to_v"))
    generator = torch.Generator().manual_seed(3)
    layers = {
        name: LoraLayer(
            down=torch.randn(2, d_in, generator=generator) / d_in**0.5, up=torch.randn(d_out, 2, generator=generator)
        )
        for name, (d_in, d_out) in backbone.named_linear_layers(signature.targets)
    }
    backbone.swap_adapter(signature, layers)
    try:
        changed = draw(plain)
        assert int((changed - base).abs().max()) > 1
        assert int((draw(fused) - changed).abs().max()) <= 1
        assert torch.equal(draw(plain), changed)
    finally:
        backbone.remove_adapter()
    assert torch.equal(draw(plain), base)
