"""Where a run's pictures lie in its store; without Ray, so that commands that only read find them too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_jobs.run import Run
from safetydpo.artifacts.layout import stage_folder
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location

PAIRS_RECIPE_VERSION = 1
"""Raised by hand when code changes the pictures of a pair or which pairs are kept."""


def image_pool(run: Run) -> Location:
    """Return the pool of pictures drawn by this run's base model and sampler."""
    identity = run.config.identity
    return _pool(
        run.store,
        base_fingerprint=run.base_fingerprint,
        dtype=identity.base.dtype,
        sampler=identity.sampler.model_dump(mode="json"),
        picture_format=identity.pairs.picture_format,
    )


def image_pool_of(store: Location, record: Record) -> Location:
    """Return the pool of the pictures of a closed pairs artifact, without a look at the base model."""
    return _pool(
        store,
        base_fingerprint=record.inputs["base"],
        dtype=record.identity["base"]["dtype"],
        sampler=record.identity["sampler"],
        picture_format=record.identity["pairs"].get("picture_format", "png"),
    )


def _pool(
    store: Location, *, base_fingerprint: str, dtype: str, sampler: Mapping[str, Any], picture_format: str
) -> Location:
    key = sha256_of([base_fingerprint, dtype, dict(sampler), PAIRS_RECIPE_VERSION])
    pool = stage_folder(store, "images") / f"pool-{key[:12]}"
    return pool if picture_format == "png" else variant(pool, picture_format)


def variant(pool: Location, name: str) -> Location:
    """Return the pool of the same pictures, stored or answered in another way."""
    return pool.parent / f"{pool.name}-{name}"
