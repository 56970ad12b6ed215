from __future__ import annotations

import hashlib
import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.artifacts import evaluation_schemas, schemas
from safetydpo.artifacts.schemas import (
    ADDED_LATER,
    canonical_json,
    caption_sha256,
    make_image_id,
    make_pair_id,
    make_prompt_id,
    sha256_of,
)

text = st.text(st.characters(codec="utf-8"), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
TABLES = {
    name: value
    for module in (schemas, evaluation_schemas)
    for name, value in vars(module).items()
    if isinstance(value, pa.Schema)
}
UNKNOWN = {
    "VERDICTS": {"unrecognisable_score", "concept", "background", "is_unrecognisable", "status", "error"},
    "PICTURE_VERDICTS": {"score"},
    "JUDGED_PICTURES": {"score", "prompt"},
    "PICTURE_CHANGES": {"distance"},
    "PICTURE_OUTCOMES": {"clip_score"},
    "METRIC_ROWS": {"cluster_low", "cluster_high", "n_reference", "seed", "scale", "rank"},
    # What another project's file may leave out of an imported prompt.
    "IMPORTED_PROMPTS": {"seed", "guidance", "width", "height"},
}
"""Columns of tables that may be null because nobody knows or asked."""


def test_canonical_json_by_hand():
    """Keys sorted at every level, no space after `:` or `,`, letters as UTF-8 and not as escapes."""
    assert canonical_json({"b": [1, 2.5, None], "a": {"ü": True, "c": "x"}}) == (
        '{"a":{"c":"x","ü":true},"b":[1,2.5,null]}'.encode()
    )


@given(json_values)
def test_canonical_json_keeps_the_value(value: object):
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(text, json_values, max_size=5), st.randoms())
def test_canonical_json_ignores_the_order_of_keys(value: dict[str, object], random):
    items = list(value.items())
    random.shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")]])
def test_numbers_that_json_lacks_are_refused(value: object):
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        canonical_json(value)


def test_an_object_without_a_json_form_is_refused():
    with pytest.raises(TypeError, match="not JSON serializable"):
        canonical_json({"a": {1, 2}})


def test_ids_by_hand():
    """Each id is the sha256 of a JSON text that can be written down."""

    def sha(json_text: str) -> str:
        return hashlib.sha256(json_text.encode()).hexdigest()

    assert sha256_of([1, "a"]) == sha('[1,"a"]')
    assert make_pair_id("a bomb", "a ball") == sha('{"safe":"a ball","unsafe":"a bomb"}')
    assert make_prompt_id("a dog") == sha('{"prompt":"a dog"}')
    assert caption_sha256("a dog") == sha("a dog")
    image = make_image_id("o", "safe", seed=3, base_fingerprint="f", sampler={"steps": 4})
    assert image == sha('{"adapter":"","base":"f","owner":"o","sampler":{"steps":4},"seed":3,"side":"safe"}')


def test_every_part_of_a_picture_counts():
    settings = {"seed": 3, "base_fingerprint": "f", "sampler": {"steps": 4}, "adapter": "x"}
    first = make_image_id("o", "safe", **settings)
    others = [
        make_image_id("p", "safe", **settings),
        make_image_id("o", "unsafe", **settings),
        *(make_image_id("o", "safe", **settings | change) for change in ({"seed": 4}, {"base_fingerprint": "g"})),
        *(make_image_id("o", "safe", **settings | change) for change in ({"sampler": {"steps": 5}}, {"adapter": ""})),
    ]
    assert len({first, *others}) == 7


@given(text, text)
def test_a_pair_has_two_sides(unsafe: str, safe: str):
    assert (make_pair_id(unsafe, safe) == make_pair_id(safe, unsafe)) == (unsafe == safe)


@pytest.mark.parametrize("name", TABLES)
def test_columns_are_distinct_and_only_what_may_be_unknown_may_be_null(name: str):
    """A picture that failed, what a judge does not know, a deviation that was not asked for."""
    schema = TABLES[name]
    assert len(set(schema.names)) == len(schema.names)
    later = {"deviation", "micro_batch", "pooled", "pooled_width", "judgements"}
    assert {field.name for field in schema if field.nullable} <= {"image"} | later | UNKNOWN.get(name, set())
    assert all(field.nullable for field in schema if field.metadata == ADDED_LATER)


def test_a_picture_made_from_another_has_an_id_of_its_own():
    """And one drawn from noise has the id it has always had."""
    settings = {"seed": 3, "base_fingerprint": "f", "sampler": {"steps": 4}}
    plain = make_image_id("o", "safe", **settings)
    assert make_image_id("o", "safe", **settings, edit=None) == plain
    edits = [{"strength": 0.5, "source": "a"}, {"strength": 0.6, "source": "a"}, {"strength": 0.5, "source": "b"}, {}]
    assert len({plain, *(make_image_id("o", "safe", **settings, edit=edit) for edit in edits)}) == 5
