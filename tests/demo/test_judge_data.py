"""What the judges learn as unrecognisable."""

from __future__ import annotations

import numpy as np
import torch

from safetydpo.demo import judge_data
from safetydpo.demo.concepts import CONCEPTS
from safetydpo.demo.judge_data import NO_BACKGROUND, JudgePictures, join, label_unrecognisable, make_unrecognisable
from safetydpo.demo.train_judges import augment_colour, augment_place, judge_loss
from safetydpo.demo.train_vae import load_vae


def make_pictures(num_rows: int) -> JudgePictures:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (num_rows, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return JudgePictures(pictures, torch.arange(num_rows), torch.arange(num_rows) % 8)


def test_shuffled_tiles_keep_every_pixel() -> None:
    pictures = make_pictures(4).pictures.numpy()
    shuffled = judge_data._shuffle_tiles(pictures, np.random.default_rng(0))
    assert (shuffled != pictures).any()
    for before, after in zip(pictures, shuffled, strict=True):
        order = np.sort(before.reshape(-1, 3).view("u1,u1,u1").ravel())
        np.testing.assert_array_equal(order, np.sort(after.reshape(-1, 3).view("u1,u1,u1").ravel()))


def test_halves_come_from_both_pictures() -> None:
    first, second = torch.zeros((9, 32, 32, 3), dtype=torch.uint8), torch.full((9, 32, 32, 3), 2, dtype=torch.uint8)
    joined = judge_data._halves(first, second, np.random.default_rng(0))
    assert joined.float().mean(dim=(1, 2, 3)).tolist() == [1.0] * 9


def test_every_kind_of_mush_is_made_and_labelled() -> None:
    mush = make_unrecognisable(make_pictures(24), load_vae(), num_each=3, run_seed=1)
    again = make_unrecognisable(make_pictures(24), load_vae(), num_each=3, run_seed=1)
    assert mush.pictures.shape == (8 * 3, 32, 32, 3)
    assert torch.equal(mush.pictures, again.pictures)
    assert set(mush.concepts.tolist()) == {len(CONCEPTS)}
    assert set(mush.backgrounds.tolist()) == {NO_BACKGROUND}


def test_pictures_without_background_do_not_count_in_its_loss() -> None:
    """Uniform concept logits over 130 classes cost ln 130; the background head's cost comes from the first row only,
    whose uniform logits over 8 cost ln 8."""
    pictures = join([make_pictures(1), label_unrecognisable(make_pictures(1).pictures)])
    background = torch.stack([torch.zeros(8), torch.arange(8.0)])
    loss = judge_loss((torch.zeros(2, len(CONCEPTS) + 1), background), pictures, smoothing=0.0)
    expected = torch.log(torch.tensor(float(len(CONCEPTS) + 1))) + torch.log(torch.tensor(8.0))
    assert torch.isclose(loss, expected)


def test_augmentations_keep_shape_and_range() -> None:
    pixels = torch.rand(6, 3, 32, 32) * 2 - 1
    for augment in (augment_colour, augment_place):
        changed = augment(pixels, torch.Generator().manual_seed(0))
        assert changed.shape == pixels.shape
        assert changed.abs().max() <= 1.0
        assert not torch.equal(changed, pixels)
