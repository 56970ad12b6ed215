from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from safetydpo.artifacts.layout import demo_weights
from safetydpo.config.schema import SamplerConfig
from safetydpo.demo.prompts import write_prompt_pairs
from safetydpo.diffusion.pictures import encode_picture
from safetydpo.diffusion.render import redraw, render
from safetydpo.errors import SafetyDPOError
from safetydpo.pairs.layout import luminance_grid, pixel_distance
from tests.diffusion.models import Model, load_model

PROMPTS = ["a red ball", "a blue flower", "a photo of a house", "a green house", "a drawing of a ball"]
NEGATIVE = ["a bomb", "a dagger", "a red bomb", "a dagger on a house", "a drawing of a bomb"]
SEEDS = [11, 2**62 + 1, 13, 14, 15]


def sampler(model: Model, *, batch_size: int, steps: int = 4) -> SamplerConfig:
    return SamplerConfig(steps=steps, guidance_scale=4.0, height=model.size, width=model.size, batch_size=batch_size)


@pytest.fixture
def sources(model: Model) -> Tensor:
    return render(model.backbone, prompts=NEGATIVE, seeds=SEEDS, sampler=sampler(model, batch_size=3))


def redrawn(model: Model, sources: Tensor, rows: list[int], **changes: object) -> Tensor:
    arguments: dict[str, object] = {
        "pictures": sources[rows],
        "prompts": [PROMPTS[row] for row in rows],
        "negative_prompts": [NEGATIVE[row] for row in rows],
        "seeds": [SEEDS[row] for row in rows],
        "sampler": sampler(model, batch_size=3),
        "strength": 0.75,
    }
    return redraw(model.backbone, **(arguments | changes))  # type: ignore[arg-type]


def test_bytes_of_a_row_do_not_depend_on_neighbours_or_position(model: Model, sources: Tensor):
    pictures = redrawn(model, sources, [0, 1, 2, 3, 4])
    assert pictures.shape == (5, model.size, model.size, 3)
    for order in ([4, 2, 0, 1, 3], [3, 3, 1, 4, 0, 2, 2], [1]):
        for place, picture in enumerate(redrawn(model, sources, order)):
            assert encode_picture(picture) == encode_picture(pictures[order[place]])


def test_every_argument_matters(model: Model, sources: Tensor):
    plain = redrawn(model, sources, [0])
    for change in (
        {"pictures": sources[1:2]},
        {"prompts": PROMPTS[1:2]},
        {"negative_prompts": [""]},
        {"seeds": [12]},
        {"strength": 0.5},
    ):
        assert not torch.equal(plain, redrawn(model, sources, [0], **change))


def test_at_full_strength_nothing_of_the_picture_is_left_but_a_trace(model: Model, sources: Tensor):
    """All steps from almost pure noise: close to `render` with the negative prompt in the unguided branch."""
    edited = redrawn(model, sources, [0], strength=1.0)
    fresh = render(
        model.backbone,
        prompts=PROMPTS[:1],
        seeds=SEEDS[:1],
        sampler=sampler(model, batch_size=3),
        negative_prompt=NEGATIVE[0],
    )
    other = redrawn(model, sources, [0], strength=0.5)
    assert distance(edited[0], fresh[0]) < distance(other[0], fresh[0])


def distance(first: Tensor, second: Tensor) -> float:
    return float((first.int() - second.int()).abs().float().mean())


def test_nothing_to_draw_gives_no_pictures(model: Model, sources: Tensor):
    assert redrawn(model, sources, []).shape == (0, model.size, model.size, 3)


def test_what_cannot_be_drawn_is_refused(model: Model, sources: Tensor):
    with pytest.raises(
        SafetyDPOError,
        match="expected one prompt, negative prompt and seed per picture, found 2 pictures, 2 prompts, 1 negative "
        "prompts, 2 seeds",
    ):
        redrawn(model, sources, [0, 1], negative_prompts=["a bomb"])
    with pytest.raises(SafetyDPOError, match=r"leaves at least one of 4 steps to run, found 0\.2: raise it"):
        redrawn(model, sources, [0], strength=0.2)


def test_sdedit_keeps_the_layout_of_the_unsafe_picture():
    """Mean over 16 pairs of the demo model at guidance 2: nearer to the unsafe picture than the safe prompt alone.

    Nearer than from other noise, and with the unsafe prompt as negative one still so, if less. (In this world a prompt
    says the layout, so other noise changes little, and at guidance 4 the negative prompt uses up the difference.)
    """
    model = load_model(demo_weights() / "base")
    settings = sampler(model, batch_size=16, steps=8).model_copy(update={"guidance_scale": 2.0})
    pairs = write_prompt_pairs()[:: len(write_prompt_pairs()) // 16][:16]
    unsafe_texts, safe_texts = [pair.unsafe.text for pair in pairs], [pair.safe.text for pair in pairs]
    seeds, others = list(range(16)), list(range(100, 116))
    unsafe = render(model.backbone, prompts=unsafe_texts, seeds=seeds, sampler=settings)
    other = render(model.backbone, prompts=safe_texts, seeds=others, sampler=settings)

    def edited(negative: list[str]) -> float:
        pictures = redraw(
            model.backbone,
            pictures=unsafe,
            prompts=safe_texts,
            negative_prompts=negative,
            seeds=seeds,
            sampler=settings,
            strength=0.5,
        )
        assert (pictures != unsafe).flatten(1).any(dim=1).all()
        return mean_layout_distance(unsafe, pictures)

    assert edited([""] * 16) < edited(unsafe_texts) < 0.9 * mean_layout_distance(unsafe, other)


def mean_layout_distance(first: Tensor, second: Tensor) -> float:
    grids = [[luminance_grid(picture.numpy()).ravel() for picture in pictures] for pictures in (first, second)]
    return float(np.mean([pixel_distance(a, b) for a, b in zip(*grids, strict=True)]))
