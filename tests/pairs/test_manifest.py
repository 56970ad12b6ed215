from __future__ import annotations

import random
from dataclasses import replace

from safetydpo.artifacts.schemas import IMAGE_MANIFEST, make_image_id
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.pairs import manifest
from safetydpo.pairs.manifest import image_row, pair_seed, sdedit_of
from safetydpo.prompts.sets import Prompt, PromptPair
from safetydpo.seeding import derive_seed

SETTINGS = {"run_seed": 5, "base_fingerprint": "f", "sampler": {"steps": 4}}


def pair_image_rows(pairs: list[PromptPair], **settings: object) -> list[dict[str, object]]:
    return list(manifest.pair_image_rows(pairs, **settings))


def retention_image_rows(prompts: list[Prompt], **settings: object) -> list[dict[str, object]]:
    return list(manifest.retention_image_rows(prompts, **settings))


def pair(unsafe: str, safe: str, concept: str, *categories: str) -> PromptPair:
    return PromptPair(unsafe, safe, category=categories[0], categories=categories, concept=concept, source="test")


BOMB = pair("a bomb", "a ball", "bomb", "violence", "illegal_activity")
AXE = pair("an axe", "a rake", "axe", "violence")
RAZOR = pair("a razor", "a comb", "razor", "self_harm")


def test_rows_by_hand():
    """Two pairs make four rows, sorted by concept; both pictures of a pair share the seed of the pair."""
    rows = pair_image_rows([BOMB, AXE], **SETTINGS)
    assert [(row["owner_id"], row["side"], row["prompt"]) for row in rows] == [
        (AXE.pair_id, "unsafe", "an axe"),
        (AXE.pair_id, "safe", "a rake"),
        (BOMB.pair_id, "unsafe", "a bomb"),
        (BOMB.pair_id, "safe", "a ball"),
    ]
    assert rows[0]["seed"] == rows[1]["seed"] == pair_seed(5, AXE.pair_id)
    assert rows[0]["seed"] != rows[2]["seed"]
    assert rows[1]["image_id"] == make_image_id(
        AXE.pair_id, "safe", seed=pair_seed(5, AXE.pair_id), base_fingerprint="f", sampler={"steps": 4}
    )
    assert {(row["adapter"], row["attempt"]) for row in rows} == {("", 1)}


def test_rows_fit_their_table():
    assert table_from_rows(pair_image_rows([BOMB, AXE], **SETTINGS), IMAGE_MANIFEST).num_rows == 4


def test_the_order_of_pairs_does_not_matter():
    pairs = [BOMB, AXE, RAZOR]
    expected = pair_image_rows(pairs, **SETTINGS)
    for seed in range(5):
        random.Random(seed).shuffle(pairs)
        assert pair_image_rows(pairs, **SETTINGS) == expected


def test_a_pair_of_two_categories_is_drawn_once():
    again = replace(BOMB, category="illegal_activity")
    assert pair_image_rows([BOMB, again, BOMB], **SETTINGS) == pair_image_rows([BOMB], **SETTINGS)


def test_one_more_pair_leaves_the_other_pictures_as_they_were():
    """The unit of identity is the picture: adding a concept costs that concept only."""
    before = {row["image_id"] for row in pair_image_rows([BOMB, AXE], **SETTINGS)}
    after = {row["image_id"] for row in pair_image_rows([BOMB, RAZOR, AXE], **SETTINGS)}
    assert before < after
    assert len(after - before) == 2


def test_every_setting_changes_every_picture():
    first = {row["image_id"] for row in pair_image_rows([BOMB, AXE], **SETTINGS)}
    for change in ({"run_seed": 6}, {"base_fingerprint": "g"}, {"sampler": {"steps": 5}}):
        assert first.isdisjoint(row["image_id"] for row in pair_image_rows([BOMB, AXE], **(SETTINGS | change)))


def test_the_seed_of_a_pair():
    assert pair_seed(5, "p") == derive_seed(5, "pair_noise", "p")


def test_benign_pictures_are_drawn_once_each_in_id_order():
    prompts = [
        Prompt(text, "neutral", "train", concept="dog", category="", categories=(), background="blue")
        for text in ("a dog", "a cat", "a dog", "a fish")
    ]
    rows = retention_image_rows(prompts, **SETTINGS)
    assert sorted(str(row["prompt"]) for row in rows) == ["a cat", "a dog", "a fish"]
    assert [row["owner_id"] for row in rows] == sorted({prompt.prompt_id for prompt in prompts})
    assert {row["side"] for row in rows} == {"benign"}
    assert rows == retention_image_rows(prompts[::-1], **SETTINGS)
    assert rows[0]["seed"] == derive_seed(5, "retention_noise", str(rows[0]["owner_id"]))


def test_image_row_keeps_what_it_is_given():
    row = image_row("o", "safe", "a dog", seed=9, base_fingerprint="f", sampler={})
    assert (row["owner_id"], row["side"], row["prompt"], row["seed"]) == ("o", "safe", "a dog", 9)


def test_safe_pictures_made_from_unsafe_ones_are_other_pictures():
    """Only the safe picture's id changes; it covers the source and the strength."""
    plain = pair_image_rows([BOMB, AXE], **SETTINGS)
    edited = pair_image_rows([BOMB, AXE], **SETTINGS, sdedit={"strength": 0.5})
    for before, after in zip(plain, edited, strict=True):
        changed = {name for name in before if before[name] != after[name]}
        assert changed == ({"image_id"} if before["side"] == "safe" else set())
    edit = sdedit_of(str(edited[0]["image_id"]), {"strength": 0.5})
    assert edited[1]["image_id"] == make_image_id(
        AXE.pair_id,
        "safe",
        seed=pair_seed(5, AXE.pair_id),
        base_fingerprint="f",
        sampler={"steps": 4},
        edit=edit,
    )
    ids = {
        row["image_id"] for s in (0.5, 0.6) for row in pair_image_rows([BOMB, AXE], **SETTINGS, sdedit={"strength": s})
    }
    assert len(ids) == 2 + 2 * 2
