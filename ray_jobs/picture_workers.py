"""Actors that measure stored pictures with the networks of `safetydpo.judges`; each loads its network once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.pools import Attachment, attach_columns
from ray_jobs.workers import decode_pictures, make_each, padded, worker_device
from safetydpo.artifacts.evaluation_schemas import PICTURE_CHANGES, PICTURE_FEATURES
from safetydpo.artifacts.pool_index import FILE_COLUMN
from safetydpo.artifacts.schemas import OUTCOMES
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.errors import SafetyDPOError

PICTURE = pa.schema([OUTCOMES.field("image_id"), OUTCOMES.field("image")])


class FeatureWorker:
    """Embeds pictures, stored or given by the path of a file, with Inception-v3."""

    def __init__(self, file: str, batch_size: int) -> None:
        from safetydpo.judges.features import InceptionFeatures

        self._batch_size = batch_size
        self._network = InceptionFeatures(Path(file), device=worker_device())

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return `picture_features` rows."""
        return table_from_rows(make_each(table.to_pylist(), self._embed, error_row=_feature_error), PICTURE_FEATURES)

    def _embed(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
        files = [row["image"] if "path" not in row else Path(row["path"]).read_bytes() for row in rows]
        values = np.concatenate([self._network.embed(batch).numpy() for batch in _of_one_size(files, self._batch_size)])
        _refuse_not_finite(values, "features")
        return [
            {"image_id": row["image_id"], "values": numbers.tolist(), **_good(row)}
            for row, numbers in zip(rows, values, strict=True)
        ]


def _of_one_size(files: Sequence[bytes], size: int) -> Iterator[Any]:
    """Yield decoded pictures in passes of one shape: all at once, or one by one where their sizes differ."""
    try:
        yield decode_pictures(padded(files, size))[: len(files)]
        return
    except ValueError:
        # Arrays of different shapes cannot be stacked.
        pass
    for file in files:
        yield decode_pictures([file])


class ChangeWorker:
    """Compares stored pictures with the base's of the same prompt and seed."""

    def __init__(self, network: Any, folder: str, pictures: Location, batch_size: int) -> None:
        from safetydpo.judges.perceptual import load_perceptual

        self._batch_size = batch_size
        self._network = load_perceptual(network, Path(folder), device=worker_device())
        self._base = Attachment(pictures, PICTURE, "image_id", by="base_image_id", rename={"image": "base_image"})

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return `picture_changes` rows."""
        names = [FILE_COLUMN.name if name == "base_file" else name for name in table.column_names]
        rows = attach_columns(table.rename_columns(names), self._base).to_pylist()
        return table_from_rows(make_each(rows, self._compare, error_row=_change_error), PICTURE_CHANGES)

    def _compare(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
        own, base = (
            decode_pictures(padded([row[side] for row in rows], self._batch_size)) for side in ("image", "base_image")
        )
        values = self._network.distance(own, base)[: len(rows)].double().cpu().numpy()
        _refuse_not_finite(values, "perceptual distance")
        return [
            {"change_id": row["change_id"], "distance": float(value), **_good(row)}
            for row, value in zip(rows, values, strict=True)
        ]


def _refuse_not_finite(values: Any, what: str) -> None:
    if not np.isfinite(values).all():
        raise SafetyDPOError(f"expected finite {what}, found a NaN or infinity")


def _good(row: Mapping[str, Any]) -> dict[str, object]:
    return {"status": "ok", "error": "", "attempt": row["attempt"]}


def _error_fields(row: Mapping[str, Any], error: BaseException) -> dict[str, object]:
    return {"status": "error", "error": " ".join(str(error).split())[:500], "attempt": row["attempt"]}


def _feature_error(row: Mapping[str, Any], error: BaseException) -> dict[str, object]:
    return {"image_id": row["image_id"], "values": [], **_error_fields(row, error)}


def _change_error(row: Mapping[str, Any], error: BaseException) -> dict[str, object]:
    return {"change_id": row["change_id"], "distance": None, **_error_fields(row, error)}
