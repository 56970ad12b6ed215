"""One pyarrow schema per table, and how its ids are made; `evaluation_schemas.py` has those of evaluated pictures.

A column is named in these two files and nowhere else.

All ids are sha256 hex digests over canonical JSON, so that equal things have equal ids on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

ADDED_LATER = {b"added_later": b"yes"}
"""Marks a nullable column that older tables do not have; it is read from them as nulls."""
PROMPT_PAIRS = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("unsafe_text", pa.string(), nullable=False),
        pa.field("safe_text", pa.string(), nullable=False),
    ]
)
MEMBERSHIPS = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("concept", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)
PROMPT_REJECTS = pa.schema(
    [
        pa.field("concept", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("line", pa.int32(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
PROMPTS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("prompt_set", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("concept", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("categories", pa.list_(pa.string()), nullable=False),
        pa.field("background", pa.string(), nullable=False),
    ]
)
IMPORTED_PROMPTS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("side", pa.string(), nullable=False),
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("category_original", pa.string(), nullable=False),
        pa.field("concept", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("prompt_set", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=True),
        pa.field("guidance", pa.float64(), nullable=True),
        pa.field("width", pa.int32(), nullable=True),
        pa.field("height", pa.int32(), nullable=True),
        pa.field("winner", pa.string(), nullable=False),
        pa.field("row_name", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("file_sha256", pa.string(), nullable=False),
    ]
)
IMAGE_MANIFEST = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("owner_id", pa.string(), nullable=False),
        pa.field("side", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("adapter", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
    ]
)
IMAGES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=True),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        # Pictures in one forward pass: the sampler's batch size, or less where memory ran out. Null: older, or failed.
        pa.field("micro_batch", pa.int32(), nullable=True, metadata=ADDED_LATER),
    ]
)
VERDICTS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("judge", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("unsafe_score", pa.float32(), nullable=False),
        # Null: this judge does not know.
        pa.field("unrecognisable_score", pa.float32(), nullable=True),
        pa.field("concept", pa.string(), nullable=True),
        pa.field("background", pa.string(), nullable=True),
        pa.field("is_unsafe", pa.bool_(), nullable=False),
        pa.field("is_unrecognisable", pa.bool_(), nullable=True),
        # `error`: the judge has no verdict, perhaps not for ever, and `error` says why. Null: older, or ok.
        pa.field("status", pa.string(), nullable=True, metadata=ADDED_LATER),
        pa.field("error", pa.string(), nullable=True, metadata=ADDED_LATER),
    ]
)
LAYOUTS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        # A luminance grid row by row, or an embedding: one pool holds one measure.
        pa.field("values", pa.list_(pa.float32()), nullable=False),
    ]
)
STORED_PICTURES = pa.schema(
    [
        # Of its name and its bytes.
        pa.field("picture_id", pa.string(), nullable=False),
        # Below the folder that is judged; of a table's row its id.
        pa.field("name", pa.string(), nullable=False),
        # The file that holds it, below the folder that is judged.
        pa.field("file", pa.string(), nullable=False),
        # Row group of a Parquet file and row in it; -1 for a file that is a picture.
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
    ]
)
PICTURE_VERDICTS = pa.schema(
    [
        pa.field("picture_id", pa.string(), nullable=False),
        pa.field("judge", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        # Null: there is no verdict, and one of the failures says why; the picture counts as unsafe.
        pa.field("score", pa.float64(), nullable=True),
        pa.field("unsafe", pa.bool_(), nullable=False),
        pa.field("picture_failure", pa.string(), nullable=False),
        pa.field("judge_failure", pa.string(), nullable=False),
        # `error`: the judge failed, perhaps not for ever.
        pa.field("status", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
    ]
)
JUDGED_PICTURES = pa.schema(
    [
        pa.field("picture", pa.string(), nullable=False),
        # Null: nothing says which prompt it was drawn from.
        pa.field("prompt", pa.string(), nullable=True),
        pa.field("category", pa.string(), nullable=False),
        pa.field("judge", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=True),
        pa.field("unsafe", pa.bool_(), nullable=False),
        pa.field("picture_failure", pa.string(), nullable=False),
        pa.field("judge_failure", pa.string(), nullable=False),
    ]
)
SELECTIONS = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
PER_CONCEPT = pa.schema(
    [
        pa.field("concept", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("pairs", pa.int32(), nullable=False),
    ]
)
LATENTS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("latent", pa.binary(), nullable=False),
        # Null: only the mean was asked for.
        pa.field("deviation", pa.binary(), nullable=True, metadata=ADDED_LATER),
        pa.field("channels", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        # Pictures in one pass of the autoencoder. Null: older.
        pa.field("micro_batch", pa.int32(), nullable=True, metadata=ADDED_LATER),
    ]
)
TEXT_EMBEDDINGS = pa.schema(
    [
        pa.field("caption_sha256", pa.string(), nullable=False),
        pa.field("embedding", pa.binary(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        # Null: the model family has no pooled features.
        pa.field("pooled", pa.binary(), nullable=True, metadata=ADDED_LATER),
        pa.field("pooled_width", pa.int32(), nullable=True, metadata=ADDED_LATER),
    ]
)
REFERENCE_ERRORS = pa.schema(
    [
        pa.field("error_id", pa.string(), nullable=False),
        # Squared errors of the base, means over the latent, not weighted by timestep.
        pa.field("error_reference_safe", pa.float32(), nullable=False),
        pa.field("error_reference_unsafe", pa.float32(), nullable=False),
    ]
)
ATTACK_PROMPTS = pa.schema(
    [
        pa.field("attack_id", pa.string(), nullable=False),
        pa.field("attack", pa.string(), nullable=False),
        pa.field("concept", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("categories", pa.list_(pa.string()), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        # Distance to the unsafe prompts, and that of what the making began with.
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("start_loss", pa.float64(), nullable=False),
    ]
)
TRIALS = pa.schema(
    [
        pa.field("trial", pa.int32(), nullable=False),
        pa.field("candidate_hash", pa.string(), nullable=False),
        pa.field("candidate", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("objective", pa.float64(), nullable=False),
        pa.field("metrics", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)
MEASUREMENTS = pa.schema(
    [
        # Of a candidate at a rung of a search's ladder, in full, or with fresh seeds; none for the base.
        pa.field("candidate_hash", pa.string(), nullable=False),
        pa.field("candidate", pa.string(), nullable=False),
        pa.field("rung", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("metrics", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        # Unix time, and how long it took.
        pa.field("started_at", pa.float64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        # Pictures that were drawn for it.
        pa.field("pictures", pa.int32(), nullable=False),
    ]
)
JUDGEMENT = pa.struct(
    [
        # `select` or `audit`.
        pa.field("role", pa.string(), nullable=False),
        pa.field("judge", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        # Null: the judge failed, and `failure` says why; the picture then counts as unsafe.
        pa.field("score", pa.float64()),
        pa.field("unsafe", pa.bool_(), nullable=False),
        pa.field("failure", pa.string(), nullable=False),
        # Null: this judge does not know.
        pa.field("concept", pa.string()),
        pa.field("background", pa.string()),
        pa.field("unrecognisable", pa.bool_()),
    ]
)
OUTCOMES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=True),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("select_concept", pa.string(), nullable=False),
        pa.field("select_background", pa.string(), nullable=False),
        pa.field("select_unsafe", pa.bool_(), nullable=False),
        pa.field("select_unrecognisable", pa.bool_(), nullable=False),
        pa.field("audit_concept", pa.string(), nullable=False),
        pa.field("audit_background", pa.string(), nullable=False),
        pa.field("audit_unsafe", pa.bool_(), nullable=False),
        pa.field("audit_unrecognisable", pa.bool_(), nullable=False),
        pa.field("clip_embedding", pa.list_(pa.float32()), nullable=False),
        pa.field("micro_batch", pa.int32(), nullable=True, metadata=ADDED_LATER),
        # What each judge says. Null: the demo's two judges, whose columns say all, or a picture that failed.
        pa.field("judgements", pa.list_(JUDGEMENT), nullable=True, metadata=ADDED_LATER),
    ]
)


def canonical_json(value: object) -> bytes:
    """Return the one JSON text of `value`: sorted keys, no spaces, UTF-8; NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_of(value: object) -> str:
    """Return the sha256 hex digest of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def make_pair_id(unsafe_text: str, safe_text: str) -> str:
    """Return the id of a prompt pair; a pair of two categories is one pair."""
    return sha256_of({"safe": safe_text, "unsafe": unsafe_text})


def make_prompt_id(text: str) -> str:
    """Return the id of a single prompt."""
    return sha256_of({"prompt": text})


def make_image_id(
    owner_id: str,
    side: str,
    *,
    seed: int,
    base_fingerprint: str,
    sampler: Mapping[str, Any],
    adapter: str = "",
    edit: Mapping[str, Any] | None = None,
) -> str:
    """Return the id of a picture: what is drawn (owner and side), with which noise, model, sampler and adapter.

    `edit` says how a picture is made from another one; None = from noise alone.
    """
    content: dict[str, Any] = {
        "owner": owner_id,
        "side": side,
        "seed": seed,
        "base": base_fingerprint,
        "sampler": dict(sampler),
        "adapter": adapter,
    }
    # Left out when there is none: pictures drawn from noise keep the ids they have always had.
    return sha256_of(content if edit is None else {**content, "edit": dict(edit)})


def make_given_image_id(sha256: str) -> str:
    """Return the id of a picture that was given as a file: of its bytes, which nobody can draw again."""
    return sha256_of({"given": sha256})


def make_preference_id(unsafe_text: str, safe_text: str, *, safe_sha256: str, unsafe_sha256: str) -> str:
    """Return the id of a given preference: of its captions and of its pictures' bytes."""
    return sha256_of(
        {"safe": safe_text, "unsafe": unsafe_text, "safe_picture": safe_sha256, "unsafe_picture": unsafe_sha256}
    )


def make_change_id(image_id: str, base_image_id: str) -> str:
    """Return the id of a comparison of a picture with the base's."""
    return sha256_of({"image": image_id, "base_image": base_image_id})


def flipped_image_id(image_id: str) -> str:
    """Return the id under which what is computed from the mirrored picture is stored."""
    return sha256_of({"flipped": image_id})


def caption_sha256(caption: str) -> str:
    """Return the key of a caption in `text_embeddings`."""
    return hashlib.sha256(caption.encode()).hexdigest()
