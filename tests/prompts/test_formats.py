from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.prompts.formats import FORMATS, check_forced, find_format, nearest_format, recognise
from safetydpo.prompts.importing import read_as
from tests.prompts.samples import TEXTS, sample


def test_names_are_distinct_and_every_format_has_a_sample():
    names = [form.name for form in FORMATS]
    assert len(set(names)) == len(names)
    assert set(TEXTS) == set(names)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_every_sample_is_recognised_by_its_content(tmp_path: Path, name: str):
    table, form = read_as(sample(tmp_path, name), None)
    assert form.name == name
    assert form.doc
    assert form.becomes
    assert set(form.texts) <= {*table.columns}


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_every_sample_is_read_when_its_format_is_forced(tmp_path: Path, name: str):
    assert read_as(sample(tmp_path, name), name)[1].name == name


def test_the_order_of_the_same_three_columns_decides():
    expected = {
        ("prompt", "case_number", "evaluation_seed"): "ring_a_bell",
        ("prompt", "evaluation_seed", "case_number"): "ring_a_bell",
        ("case_number", "evaluation_seed", "prompt"): "six_cd",
        ("evaluation_seed", "case_number", "prompt"): "six_cd",
        ("case_number", "prompt", "evaluation_seed"): "seeded",
        ("evaluation_seed", "prompt", "case_number"): "ring_a_bell",
    }
    for columns in permutations(("prompt", "case_number", "evaluation_seed")):
        assert recognise(columns, [], file="x").name == expected[columns]


def test_of_several_formats_the_one_with_more_columns_is_taken():
    columns = ("unsafe_text", "safe_text", "category")
    assert recognise(columns, [], file="x").name == "pairs"
    assert recognise(("prompt", "categories", "evaluation_seed", "evaluation_guidance"), [], file="x").name == "i2p"


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            ("prompt", "image", "label"),
            r"found 'prompt', 'image', 'label'; nearest is coprov2_train \(without 'category'; besides 'label'\)",
        ),
        (("jpg_0", "jpg_1", "label_0"), r"nearest is coprov2_preferences \(without 'caption'\): rename the columns"),
        (
            ("unsafe_text", "safe_text", "colour"),
            r"nearest is pairs \(besides 'colour'\): --format pairs leaves those columns out, or --format lines",
        ),
    ],
)
def test_unknown_columns_are_named_with_the_nearest_format(columns: tuple[str, ...], told: str):
    with pytest.raises(SafetyDPOError, match=f"expected the columns of a known format in x, .*{told}"):
        recognise(columns, [], file="x")


def test_image_names_of_no_known_form_are_named():
    with pytest.raises(SafetyDPOError, match=r"expected image names such as .* found 'dog.png': name the format"):
        recognise(("prompt", "image", "category"), ["dog.png"], file="x")


def test_the_nearest_format_by_hand():
    """MMA has 4 of its 5 columns there: a share of 4 / 5; what has none of a format's columns is near nothing."""
    columns = ("target_prompt", "adv_prompt", "sanitized_adv_prompt", "clean_prompt")
    nearest = nearest_format(columns)
    assert nearest is not None
    assert nearest.name == "mma_diffusion"
    assert nearest_format(("id", "colour")) is None
    with pytest.raises(SafetyDPOError, match="found 'id', 'colour'; no format has one of them: rename the columns"):
        recognise(("id", "colour"), [], file="x")


def test_an_unknown_format_and_a_wrong_one_are_refused():
    with pytest.raises(UsageError, match="expected a format out of coprov2_train, .* found 'i3p'"):
        find_format("i3p")
    with pytest.raises(UsageError, match="expected column 'categories' of format i2p in x, found 'prompt', 'seed'"):
        check_forced(find_format("i2p"), ("prompt", "seed"), file="x")


def test_a_forced_format_on_plain_lines_names_the_missing_column(tmp_path: Path):
    with pytest.raises(UsageError, match="expected column 'image_id' of format coco_captions in .*, found 'a bomb, in"):
        read_as(sample(tmp_path, "lines"), "coco_captions")


def test_any_text_can_be_read_as_lines(tmp_path: Path):
    table, form = read_as(sample(tmp_path, "coco_captions"), "lines")
    assert form.name == "lines"
    assert table.rows[0][1] == {"line": "image_id,text"}
