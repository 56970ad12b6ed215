"""Every trap of the prompt files, on small files of the same shape."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.artifacts.schemas import IMPORTED_PROMPTS, make_pair_id, make_prompt_id
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.prompts.duplicates import NEAR, find_near, normalise
from safetydpo.prompts.importing import ImportedSet, ImportOptions, assign_splits, import_prompts
from safetydpo.prompts.rows import FilePrompt
from tests.prompts.samples import TEXTS, as_json_lines, as_parquet, place, sample


def imported(folder: Path, content: str | bytes, **options: Any) -> ImportedSet:
    return import_prompts(place(folder, content), ImportOptions(**options))


def rows(found: ImportedSet, *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in columns) for row in found.table.to_pylist()]


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_every_format_becomes_one_table(tmp_path: Path, name: str):
    found = import_prompts(sample(tmp_path, name))
    assert found.table.schema == IMPORTED_PROMPTS
    assert found.summary.format == name
    for row in found.table.to_pylist():
        assert row["prompt_id"] == make_prompt_id(row["text"])
        assert (row["source"], row["format"], row["file_sha256"]) == (name, name, found.summary.sha256)
    by_pair = {(row["pair_id"], row["side"]): row["text"] for row in found.table.to_pylist() if row["pair_id"]}
    assert all(make_pair_id(by_pair[pair, "unsafe"], by_pair[pair, "safe"]) == pair for pair, _ in by_pair)


def test_coprov2_pairs_by_image_name_and_not_by_row(tmp_path: Path):
    """Rows 2 and 3 stand together and are a pair; rows 1 and 4 stand apart and are one. Row 7 has no partner.

    Images u_idx_0000000_0 and s_idx_0000000_0 stand in two rows each, for two categories: one pair, two memberships.
    """
    found = import_prompts(sample(tmp_path, "coprov2_train"))
    bomb = make_pair_id("A bomb, on a table", "A ball, on a table")
    wasp = make_pair_id("A wasp by the door", "A bee by the door")
    assert rows(found, "row", "side", "pair_id", "category", "category_original") == [
        (1, "unsafe", bomb, "hate", "Hate"),
        (2, "unsafe", wasp, "harassment", "Harrasment"),
        (3, "safe", wasp, "harassment", "Harrasment"),
        (4, "safe", bomb, "hate", "Hate"),
        (5, "safe", bomb, "illegal_activity", "Illegal Activity"),
        (6, "unsafe", bomb, "illegal_activity", "Illegal Activity"),
        (7, "unsafe", "", "self_harm", "self-harm"),
    ]
    summary = found.summary
    assert (summary.num_rows, summary.num_pairs_in_file, summary.num_pair_ids, summary.num_texts) == (7, 2, 2, 5)
    assert summary.num_memberships == 4
    assert summary.memberships == {
        "hate": (1, 1),
        "illegal_activity": (1, 1),
        "harassment": (1, 1),
        "self_harm": (1, 1),
    }
    assert summary.duplicates == {"prompts whose text occurs before": 2, "image names in several rows": 2}
    assert summary.notes == {"prompts without a partner": 1}


def test_two_image_names_with_the_same_two_texts_are_one_pair_id(tmp_path: Path):
    content = TEXTS["coprov2_train"] + (
        "A wasp by the door,u_idx_0000009_0.jpg,Hate\nA bee by the door,s_idx_0000009_0.jpg,Hate\n"
    )
    summary = imported(tmp_path, content).summary
    assert (summary.num_pairs_in_file, summary.num_pair_ids) == (3, 2)
    assert summary.duplicates["pairs whose two texts occur before"] == 1


def test_an_image_name_with_two_texts_is_refused(tmp_path: Path):
    content = TEXTS["coprov2_train"] + "Another text,u_idx_0000001_0.jpg,Hate\n"
    with pytest.raises(SafetyDPOError, match=r"expected one text for image 'u_idx_0000001_0.jpg' .* rows 2 and 8"):
        imported(tmp_path, content)


def test_training_and_test_captions_in_one_file_are_refused(tmp_path: Path):
    content = TEXTS["coprov2_train"] + "Another text,0000001_0.jpg,Hate\n"
    with pytest.raises(SafetyDPOError, match=r"expected an image name such as .* in row 8 of .* found '0000001_0.jpg'"):
        imported(tmp_path, content)


def test_coprov2_test_has_no_partner_and_no_seed(tmp_path: Path):
    found = import_prompts(sample(tmp_path, "coprov2_test"))
    assert rows(found, "side", "pair_id", "seed", "split", "prompt_set") == [("unsafe", "", None, "test", "unsafe")] * 2


PREFERENCES = [
    {"jpg_0": "a", "jpg_1": "b", "label_0": 1, "caption": "A bomb", "image": "u_idx_0000000_0.jpg"},
    {"jpg_0": "a", "jpg_1": "b", "label_0": 0, "caption": "A ball", "image": "s_idx_0000000_0.jpg"},
    {"jpg_0": "a", "jpg_1": "b", "label_0": 0.5, "caption": "A wasp", "image": "u_idx_0000001_0.jpg"},
]


@pytest.mark.parametrize("as_file", ["csv", "parquet", "pictures"])
def test_preferences_have_a_winner_and_ties_are_dropped(tmp_path: Path, as_file: str):
    """On the Hub `image` is a picture, bytes and path; only the path is read."""
    if as_file == "csv":
        content: str | bytes = TEXTS["coprov2_preferences"]
    elif as_file == "parquet":
        content = as_parquet(PREFERENCES)
    else:
        picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        kinds = {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64(), "caption": pa.string()}
        schema = pa.schema([*kinds.items(), ("image", picture)])
        content = as_parquet(
            [
                row | {"jpg_0": b"\xff", "jpg_1": b"\xff", "image": {"bytes": b"\xff", "path": row["image"]}}
                for row in PREFERENCES
            ],
            schema,
        )
    found = imported(tmp_path, content)
    pair = make_pair_id("A bomb", "A ball")
    assert rows(found, "text", "side", "winner", "pair_id") == [
        ("A bomb", "unsafe", "jpg_0", pair),
        ("A ball", "safe", "jpg_1", pair),
    ]
    assert found.summary.dropped == {"tie": 1}


def test_preferences_without_names_need_a_side(tmp_path: Path):
    content = "jpg_0,jpg_1,label_0,caption\nxx,yy,1,A bomb\n"
    with pytest.raises(SafetyDPOError, match="without it a caption's side is not known; give --side"):
        imported(tmp_path, content)
    assert rows(imported(tmp_path, content, side="unsafe"), "side", "winner") == [("unsafe", "jpg_0")]


def test_a_preference_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(SafetyDPOError, match=r"expected label_0 of 1, 0 or 0.5 \(a tie\) in row 1 of .*, found '2'"):
        imported(tmp_path, "jpg_0,jpg_1,label_0,caption\nxx,yy,2,A bomb\n")


def test_i2p_categories_are_a_comma_list_and_sizes_vary(tmp_path: Path):
    """3 rows and 3 memberships of row 2: 5 in all; the index column and the others are no concern."""
    found = import_prompts(sample(tmp_path, "i2p"))
    assert rows(found, "row", "category", "category_original", "seed", "guidance", "width", "height") == [
        (1, "violence", "violence", 4261553411, 13.0, 512, 512),
        (2, "hate", "hate", 17, 7.5, 768, 512),
        (2, "self_harm", "self-harm", 17, 7.5, 768, 512),
        (2, "illegal_activity", "illegal activity", 17, 7.5, 768, 512),
        (3, "shocking", "shocking", 18, 7.0, 512, 704),
    ]
    assert rows(found, "text")[-1] == ("a wet\nspider",)
    assert (found.summary.num_rows, found.summary.num_prompts, found.summary.num_memberships) == (3, 3, 5)


@pytest.mark.parametrize("first", ["", "Unnamed: 0"])
def test_the_index_column_of_i2p_has_a_name_or_none(tmp_path: Path, first: str):
    content = TEXTS["i2p"].replace("Unnamed: 0", first, 1)
    assert imported(tmp_path, content).summary.format == "i2p"


def test_i2p_on_the_hub_has_other_names_for_seed_and_guidance(tmp_path: Path):
    found = import_prompts(sample(tmp_path, "i2p_hub"))
    assert rows(found, "seed", "guidance")[0] == (4261553411, 13.0)


def test_ring_a_bell_in_both_copies(tmp_path: Path):
    single = import_prompts(sample(tmp_path, "ring_a_bell"))
    assert rows(single, "text", "side", "seed", "row_name")[1] == ("spider ¿ web", "unsafe", 14, "1")
    pairs = import_prompts(sample(tmp_path, "ring_a_bell_pairs"))
    assert rows(pairs, "row", "side", "text")[:2] == [
        (1, "unsafe", "a bomb on a desk"),
        (1, "safe", "a lamp on a desk"),
    ]
    assert pairs.summary.num_pair_ids == 2


@pytest.mark.parametrize(
    ("column", "text"), [(None, "b0mb boom"), ("sanitized_adv_prompt", "boom tick"), ("target_prompt", "a bomb")]
)
def test_mma_diffusion_has_a_column_by_mode_and_a_benign_partner(tmp_path: Path, column: str | None, text: str):
    found = imported(tmp_path, TEXTS["mma_diffusion"], column=column)
    assert rows(found, "side", "text")[:2] == [("unsafe", text), ("safe", "a ball")]
    assert rows(found, "side", "pair_id")[2:] == [("unsafe", "")]
    assert found.summary.notes == {"prompts without a partner": 1}


def test_a_column_that_the_format_has_not_is_refused(tmp_path: Path):
    with pytest.raises(
        UsageError, match="expected a --column out of adv_prompt, .* for format mma_diffusion, found 'x'"
    ):
        imported(tmp_path, TEXTS["mma_diffusion"], column="x")


def test_hub_translations_by_language(tmp_path: Path):
    assert rows(imported(tmp_path, TEXTS["hub_translations"]), "text")[0] == ("a bomb",)
    assert rows(imported(tmp_path, TEXTS["hub_translations"], column="French"), "text")[1] == ("une guêpe",)


def test_plain_lines_are_unsafe_unless_said_otherwise(tmp_path: Path):
    found = imported(tmp_path, TEXTS["lines"])
    assert rows(found, "row", "text", "side")[1] == (3, "a wasp, drawn", "unsafe")
    assert found.summary.notes["prompts taken as unsafe, which the file does not say (--side)"] == 4
    assert rows(imported(tmp_path, TEXTS["lines"], side="benign"), "prompt_set")[0] == ("neutral",)


def test_six_cd_malicious_and_clean_rows_align(tmp_path: Path):
    """By case number, whatever the order; the target is the concept."""
    malicious = place(tmp_path, TEXTS["six_cd"])
    clean = "case_number,evaluation_seed,prompt\n1,7,A plate\n0,28661,A plum\n"
    found = import_prompts(malicious, partner=place(tmp_path, clean, "clean"))
    assert rows(found, "row", "side", "text", "concept", "seed") == [
        (1, "unsafe", "A pear", "old master", 28661),
        (1, "safe", "A plum", "old master", 28661),
        (2, "unsafe", "A cup", "", 7),
        (2, "safe", "A plate", "", 7),
    ]
    for other, told in ((clean.replace("1,7", "1,8"), "another seed"), (clean.replace("1,7", "2,7"), "no such row")):
        with pytest.raises(SafetyDPOError, match=f"expected case '1' of .* with its seed in .*, found {told}"):
            import_prompts(malicious, partner=place(tmp_path, other, "clean"))
    with pytest.raises(SafetyDPOError, match="expected each case number once in .*, found '0' twice"):
        import_prompts(malicious, partner=place(tmp_path, clean + "0,28661,A plum\n", "clean"))
    with pytest.raises(SafetyDPOError, match="expected format six_cd in .*/clean too, found coco_captions"):
        import_prompts(malicious, partner=place(tmp_path, TEXTS["coco_captions"], "clean"))
    lines = place(tmp_path, TEXTS["lines"])
    with pytest.raises(UsageError, match="expected format six_cd with --partner, found lines"):
        import_prompts(lines, partner=lines)


def test_coco_in_both_forms_is_benign_and_without_space_at_the_ends(tmp_path: Path):
    for name in ("coco", "coco_captions"):
        found = import_prompts(sample(tmp_path, name))
        assert set(rows(found, "side", "prompt_set")) == {("benign", "neutral")}
    assert rows(found, "text")[1] == ("A clock and a wheel.",)
    content = TEXTS["coco"].replace("seed\n", "seed,coco_id\n").replace("41337", "41337,9")
    assert imported(tmp_path, content).summary.format == "coco"


def test_side_set_and_split_may_stand_in_the_file(tmp_path: Path):
    found = imported(tmp_path, TEXTS["prompts"], split="train")
    assert rows(found, "side", "split", "prompt_set") == [
        ("unsafe", "test", "unsafe"),
        ("benign", "validation", "neutral"),
    ]
    assert rows(imported(tmp_path, TEXTS["texts"]), "side", "prompt_set") == [("benign", "neutral"), ("unsafe", "ood")]


def test_categories_may_be_a_list(tmp_path: Path):
    content = as_json_lines([{"prompt": "a bomb", "categories": ["Hate", "hate", "self-harm"]}, {"prompt": "a dog"}])
    assert rows(imported(tmp_path, content), "category", "category_original") == [
        ("hate", "Hate"),
        ("self_harm", "self-harm"),
        ("", ""),
    ]


def test_unknown_categories_are_named_mapped_or_kept(tmp_path: Path):
    content = "prompt,category\na bomb,Bad Weather\na wasp,Bad Weather\na dog,hate\n"
    with pytest.raises(
        SafetyDPOError, match=r"expected categories out of hate, .* found 'Bad Weather' \(2 rows\): name"
    ):
        imported(tmp_path, content)
    mapped = imported(tmp_path, content, aliases={"bad_weather": "violence"})
    assert rows(mapped, "category", "category_original")[0] == ("violence", "Bad Weather")
    kept = imported(tmp_path, content, keep_unknown_categories=True)
    assert list(kept.summary.memberships.items()) == [("hate", (1, 1)), ("bad_weather", (2, 2))]


def test_rows_left_out_are_counted_by_reason(tmp_path: Path):
    found = imported(tmp_path, "unsafe_text,safe_text\na bomb, \n ,a ball\na bee,a bee\na wasp,a fly\n")
    assert found.summary.dropped == {"no safe text": 1, "no text": 1, "unsafe and safe text are the same": 1}
    assert found.summary.num_pair_ids == 1


def test_columns_left_out_are_named(tmp_path: Path):
    content = "unsafe_text,safe_text,colour\na bomb,a ball,red\n"
    assert imported(tmp_path, content, format="pairs").summary.notes == {"column left out: colour": 1}


def test_a_file_without_a_prompt_is_refused(tmp_path: Path):
    with pytest.raises(SafetyDPOError, match=r"found none \(no row below the header\): name another file"):
        imported(tmp_path, "unsafe_text,safe_text\n")
    with pytest.raises(SafetyDPOError, match=r"found none \(no safe text: 1\)"):
        imported(tmp_path, "unsafe_text,safe_text\na bomb,\n")


def test_a_side_where_it_is_known_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="expected no --side for format coco, whose sides are known, found 'unsafe'"):
        imported(tmp_path, TEXTS["coco"], side="unsafe")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": 5}, "expected text in column 'prompt', row 1 of .*, found '5'"),
        ({"prompt": "a \ud800"}, "found in line 1: JSON with half of a surrogate pair, which no encoding can write"),
        ({"prompt": "a", "seed": "x"}, "expected a number in column 'seed', row 1 of .*, found 'x'"),
        ({"prompt": "a", "seed": True}, "expected a number in column 'seed', row 1 of .*, found 'True'"),
        ({"prompt": "a", "seed": 1.5}, r"expected a whole number from 0 to 2\^63 - 1 in column 'seed'.* found '1.5'"),
        ({"prompt": "a", "seed": -1}, r"expected a whole number from 0 to 2\^63 - 1"),
        ({"prompt": "a", "seed": 2**63}, r"expected a whole number from 0 to 2\^63 - 1"),
        ({"prompt": "a", "guidance": "inf"}, "expected a finite number in column 'guidance'"),
        ({"prompt": "a", "side": "bad"}, "expected one of unsafe, safe, benign in column 'side', row 1"),
        ({"prompt": "a", "split": "dev"}, "expected one of train, validation, test in column 'split'"),
        ({"prompt": "a", "category": 7}, "expected text in column 'category'"),
        (
            {"prompt": "a", "side": "unsafe", "prompt_set": "neutral"},
            "expected side 'benign' with prompt_set 'neutral'",
        ),
    ],
)
def test_values_that_cannot_be_are_refused_with_their_row(tmp_path: Path, row: dict[str, object], told: str):
    import json

    with pytest.raises(SafetyDPOError, match=told):
        imported(tmp_path, json.dumps(row) + "\n")


def test_seeds_beyond_the_precision_of_a_float(tmp_path: Path):
    content = f"prompt,seed\na,{2**63 - 1}\nb,12.0\nc,\n"
    assert rows(imported(tmp_path, content), "seed") == [(2**63 - 1,), (12,), (None,)]


def test_a_named_source(tmp_path: Path):
    assert rows(imported(tmp_path, TEXTS["lines"], source="mine"), "source", "format")[0] == ("mine", "lines")


WORDS = ["red", "green", "blue", "dog", "cat", "bomb", "ball", "tree"]
VOCABULARY = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6)


@given(st.lists(VOCABULARY.map(" ".join), min_size=1, max_size=12), st.randoms())
def test_no_split_holds_a_near_duplicate_of_another(texts: list[str], random):
    prompts = [FilePrompt(row=row, text=text, side="unsafe") for row, text in enumerate(texts)]
    splits = assign_splits(prompts, "auto")
    for pair in find_near(texts, texts, near=NEAR):
        assert splits[pair.left] == splits[pair.right]
    order = list(range(len(prompts)))
    random.shuffle(order)
    assert assign_splits([prompts[place] for place in order], "auto") == [splits[place] for place in order]


def test_the_automatic_split_keeps_pairs_together_and_is_about_8_to_1_to_1():
    """2,000 pairs of words of their own: 80 % +- 4 standard deviations of 0.9 points."""
    prompts = [
        FilePrompt(row=row, text=f"{side}{row}", side=side, pair_id=str(row))
        for row in range(2000)
        for side in ("unsafe", "safe")
    ]
    splits = assign_splits(prompts, "auto")
    assert splits[::2] == splits[1::2]
    shares = Counter(splits[::2])
    assert 1530 <= shares["train"] <= 1670
    assert 145 <= shares["test"] <= 255
    assert assign_splits(prompts, "validation") == ["validation"] * 4000


def test_equal_texts_but_for_case_share_a_split():
    texts = [f"Word{row}" for row in range(40)]
    prompts = [FilePrompt(row=0, text=text, side="unsafe") for text in [*texts, *map(str.lower, texts)]]
    splits = assign_splits(prompts, "auto")
    assert splits[:40] == splits[40:]
    assert normalise("Word1") == "word1"
