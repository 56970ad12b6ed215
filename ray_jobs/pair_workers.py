"""Actors of the pairs stage beside the plain ones: SDEdit of unsafe pictures, and what layouts are compared by.

Each loads its networks once; see `workers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from ray_jobs.workers import RenderWorker, decode_pictures, padded
from safetydpo.artifacts.schemas import LAYOUTS
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.schema import SamplerConfig

Measure = Literal["pixels", "embedding"]


class SdeditWorker(RenderWorker):
    """Makes pictures from the `source` of manifest rows, away from their `negative_prompt`."""

    def __init__(
        self, base: Mapping[str, Any], sampler: Mapping[str, Any], strength: float, picture_format: str = "png"
    ) -> None:
        super().__init__(base, sampler, picture_format)
        self._strength = strength

    def _draw(self, rows: Sequence[Mapping[str, Any]], sampler: SamplerConfig) -> Any:
        from safetydpo.diffusion.render import redraw

        return redraw(
            self._backbone,
            pictures=decode_pictures([row["source"] for row in rows]),
            prompts=[row["prompt"] for row in rows],
            negative_prompts=[row["negative_prompt"] for row in rows],
            seeds=[row["seed"] for row in rows],
            sampler=sampler,
            strength=self._strength,
        )


class LayoutWorker:
    """Reduces stored pictures to what their layouts are compared by: a luminance grid or a CLIP embedding."""

    def __init__(self, measure: Measure, clip: str, batch_size: int) -> None:
        self._batch_size = batch_size
        self._clip: Any = None
        if measure == "embedding":
            from safetydpo.judges.build import clip_folder
            from safetydpo.judges.clip import ClipScorer

            self._clip = ClipScorer(clip_folder(clip))

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return `layouts` rows."""
        from safetydpo.pairs.layout import luminance_grid

        pictures = decode_pictures(padded(table.column("image").to_pylist(), self._batch_size))
        if self._clip is None:
            values = [luminance_grid(picture.numpy()).ravel() for picture in pictures[: table.num_rows]]
        else:
            values = list(self._clip.embed_images(pictures)[: table.num_rows].numpy())
        ids = table.column("image_id").to_pylist()
        rows = [{"image_id": i, "values": numbers.tolist()} for i, numbers in zip(ids, values, strict=True)]
        return table_from_rows(rows, LAYOUTS)
