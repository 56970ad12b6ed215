"""A step's rows in equal parts, for networks that do not take them all at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from operator import itemgetter
from typing import Any

from safetydpo.diffusion.backbone import Condition
from safetydpo.dpo.batch import StepBatch
from safetydpo.errors import UsageError


def micro_batches(batch: StepBatch, *, pairs_per_forward: int | None) -> Iterator[StepBatch]:
    """Yield the batch in parts of `pairs_per_forward` pairs, each with an equal share of the benign pictures.

    Parts of equal size only: then the mean over parts of a mean over rows is the mean over all rows, whatever the
    terms of the loss. None, or no fewer than the process has
    = the batch itself.

    Raises:
        UsageError: if the rows do not split evenly.
    """
    if pairs_per_forward is None or pairs_per_forward >= batch.num_pairs:
        yield batch
        return
    num_benign = batch.retention_latents.shape[0]
    num_parts, left = divmod(batch.num_pairs, pairs_per_forward)
    if left or num_benign % num_parts:
        raise UsageError(
            f"expected dpo.pairs_per_forward ({pairs_per_forward}) to split a process's rows of a step into equal "
            f"parts, found {batch.num_pairs} pairs and {num_benign} benign pictures: change dpo.pairs_per_forward, "
            "dpo.pairs_per_step or dpo.retention_per_step"
        )
    per_part = num_benign // num_parts
    for part in range(num_parts):
        yield _rows(
            batch,
            pairs=slice(part * pairs_per_forward, (part + 1) * pairs_per_forward),
            benign=slice(part * per_part, (part + 1) * per_part),
        )


def _rows(batch: StepBatch, *, pairs: slice, benign: slice) -> StepBatch:
    chosen: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if field.name == "empty_condition":
            continue  # one row for all
        rows = benign if field.name.startswith("retention_") else pairs
        if isinstance(value, Condition):
            chosen[field.name] = value.map(itemgetter(rows))
        elif value is not None:
            chosen[field.name] = value[rows]
    return replace(batch, **chosen)
