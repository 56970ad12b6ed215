"""Schemas of what is computed from evaluated pictures: features, changes, rates per concept, metrics."""

from __future__ import annotations

import pyarrow as pa

PICTURE_FEATURES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        # Of one network, whose fingerprint names the pool; empty where the picture failed.
        pa.field("values", pa.list_(pa.float32()), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
    ]
)
PICTURE_CHANGES = pa.schema(
    [
        pa.field("change_id", pa.string(), nullable=False),
        # How far one network sees a picture from the base's of the same prompt and seed; null where it failed.
        pa.field("distance", pa.float64(), nullable=True),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
    ]
)
CONCEPT_RATES = pa.schema(
    [
        pa.field("row", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        # Empty where the prompts have none.
        pa.field("category", pa.string(), nullable=False),
        pa.field("concept", pa.string(), nullable=False),
        pa.field("hits", pa.int64(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        # Exact two-sided 95 % interval.
        pa.field("low", pa.float64(), nullable=False),
        pa.field("high", pa.float64(), nullable=False),
    ]
)
PICTURE_OUTCOMES = pa.schema(
    [
        # What a report was computed from, picture by picture, without pictures and texts: enough to compare two runs.
        pa.field("row", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("prompt_set", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("concept", pa.string(), nullable=False),
        pa.field("failed", pa.bool_(), nullable=False),
        # Names of the rates that count this picture, and of those that it is a hit of.
        pa.field("rates", pa.list_(pa.string()), nullable=False),
        pa.field("hits", pa.list_(pa.string()), nullable=False),
        pa.field("clip_score", pa.float64(), nullable=True),
    ]
)
METRIC_ROWS = pa.schema(
    [
        # One metric of one row of a summary; a null seed is all seeds pooled.
        pa.field("row", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        # Ends of the two-sided 95 % interval; those over concepts are null where there are none.
        pa.field("low", pa.float64(), nullable=False),
        pa.field("high", pa.float64(), nullable=False),
        pa.field("cluster_low", pa.float64(), nullable=True),
        pa.field("cluster_high", pa.float64(), nullable=True),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=True),
        pa.field("split", pa.string(), nullable=False),
    ]
)
