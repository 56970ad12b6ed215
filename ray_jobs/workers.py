"""What an actor of a Ray Data pool does: load its networks once, then turn manifest rows into output rows."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from safetydpo.artifacts.schemas import IMAGES, LATENTS, TEXT_EMBEDDINGS, VERDICTS
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.judges import JudgesConfig
from safetydpo.config.schema import BaseModelConfig, SamplerConfig

logger = logging.getLogger(__name__)
Row = Mapping[str, Any]
Made = dict[str, object]
OUR_ERRORS = (TypeError, AttributeError, NameError, ImportError, AssertionError, NotImplementedError)
ErrorRow = Callable[[Row, BaseException], Made]
DRAWN = "drawn"
"""Key of a picture's pixels in a manifest row that has been drawn, and not yet been finished."""


def worker_device() -> str:
    """Return the device that Ray gave this process."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def make_each(rows: Sequence[Row], make: Callable[[Sequence[Row]], list[Made]], *, error_row: ErrorRow) -> list[Made]:
    """Return `make(rows)`; if that fails, make each row alone, and an error row of each that fails alone too.

    One bad row must not take its neighbours along; batches are padded anyway, so that a row made alone is the same.
    A row that could end the process would end it at every later command too, so that all exceptions count but those
    that no row can cause.

    Raises:
        RuntimeError: if the device is broken; then nothing more can be made in this process.
        TypeError, AttributeError, ...: an error of ours (`OUR_ERRORS`), which every row would have.
    """
    try:
        return make(rows)
    except Exception as error:
        if isinstance(error, OUR_ERRORS) or _is_broken_device(error):
            raise
        if len(rows) > 1:
            return [result for row in rows for result in make_each([row], make, error_row=error_row)]
        logger.warning("picture %s failed: %s", rows[0]["image_id"], error)
        return [error_row(rows[0], error)]


def finish_each(
    drawn: Sequence[Made], finish: Callable[[Sequence[Row]], list[Made]], *, error_row: ErrorRow
) -> list[Made]:
    """Return `finish` of the rows that have been drawn, and error rows as they are; the order stays."""
    good = [row for row in drawn if DRAWN in row]
    finished = iter(make_each(good, finish, error_row=error_row) if good else [])
    return [next(finished) if DRAWN in row else row for row in drawn]


def _is_broken_device(error: BaseException) -> bool:
    text = str(error)
    return "device-side assert" in text or "ECC" in text or "CUDA error" in text


class RenderWorker:
    """Draws the pictures of manifest rows with the base model.

    Of several calls at the same time one draws, while those before it write the files of their pictures.
    """

    def __init__(self, base: Mapping[str, Any], sampler: Mapping[str, Any], picture_format: str = "png") -> None:
        from safetydpo.diffusion.build import load_backbone
        from safetydpo.diffusion.memory import PassSize

        self._format: Any = picture_format
        self._sampler = SamplerConfig(**sampler)
        self._pass_size = PassSize(self._sampler.batch_size)
        self._backbone = load_backbone(BaseModelConfig(**base), device=worker_device())
        self._drawing = threading.Lock()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return `images` rows; a picture that fails becomes an error row, the others are unharmed."""
        with self._drawing:
            drawn = make_each(table.to_pylist(), self._render, error_row=self.error_row)
        return table_from_rows(finish_each(drawn, self._image_rows, error_row=self.error_row), IMAGES)

    def error_row(self, row: Row, error: BaseException) -> Made:
        """Return the `images` row of a picture that could not be drawn."""
        return image_error_row(row, error)

    def _render(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
        from safetydpo.diffusion.memory import draw_within_memory

        sampler = self._sampler.model_copy(update={"batch_size": self._pass_size.size})
        pictures, size = draw_within_memory(lambda fitting: self._draw(rows, fitting), sampler=sampler)
        self._pass_size.note(size)
        return [{**row, DRAWN: picture, "micro_batch": size} for row, picture in zip(rows, pictures, strict=True)]

    def _draw(self, rows: Sequence[Mapping[str, Any]], sampler: SamplerConfig) -> Any:
        from safetydpo.diffusion.render import render

        return render(
            self._backbone,
            prompts=[row["prompt"] for row in rows],
            seeds=[row["seed"] for row in rows],
            sampler=sampler,
        )

    def _image_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
        return [self._image_row(row, row[DRAWN]) for row in rows]

    def _image_row(self, row: Mapping[str, Any], picture: Any) -> dict[str, object]:
        from safetydpo.diffusion.pictures import encode_picture

        data = encode_picture(picture, format=self._format)
        return {
            "image_id": row["image_id"],
            "image": data,
            "sha256": hashlib.sha256(data).hexdigest(),
            "status": "ok",
            "error": "",
            "attempt": row["attempt"],
            "width": picture.shape[1],
            "height": picture.shape[0],
            "format": self._format,
            "micro_batch": row["micro_batch"],
        }


def image_error_row(row: Mapping[str, Any], error: BaseException) -> dict[str, object]:
    """Return the `images` row of a picture that could not be drawn."""
    return {
        "image_id": row["image_id"],
        "image": None,
        "sha256": "",
        "status": "error",
        "error": " ".join(str(error).split())[:500],
        "attempt": row["attempt"],
        "width": 0,
        "height": 0,
        "format": "",
        "micro_batch": None,
    }


class JudgeWorker:
    """Judges stored pictures; one that does not decode, or that the judge fails on, says so in its row."""

    def __init__(self, judge: str, batch_size: int, settings: Mapping[str, Any] | None = None) -> None:
        from safetydpo.judges.build import load_judge

        self._batch_size = batch_size
        self._judge = load_judge(judge, JudgesConfig.model_validate(settings or {}), device=worker_device())

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return `verdicts` rows."""
        rows = table.select(["image_id", "image"]).to_pylist()
        return table_from_rows(make_each(rows, self._look, error_row=self.error_row), VERDICTS)

    def _look(self, rows: Sequence[Row]) -> list[Made]:
        pictures = decode_pictures(padded([row["image"] for row in rows], self._batch_size))
        verdicts = self._judge.judge(pictures)
        return [
            {
                "image_id": row["image_id"],
                "judge": self._judge.name,
                "version": self._judge.version,
                "unsafe_score": verdicts.unsafe_score[index],
                "unrecognisable_score": verdicts.unrecognisable_score[index],
                "concept": verdicts.concept[index],
                "background": verdicts.background[index],
                "is_unsafe": verdicts.counts_as_unsafe(index),
                "is_unrecognisable": verdicts.is_unrecognisable[index],
                "status": "error" if verdicts.failure_of(index) else "ok",
                "error": " ".join(verdicts.failure_of(index).split())[:500],
            }
            for index, row in enumerate(rows)
        ]

    def error_row(self, row: Row, error: BaseException) -> Made:
        """Return the `verdicts` row of a picture that could not be judged."""
        return {
            "image_id": row["image_id"],
            "judge": self._judge.name,
            "version": self._judge.version,
            "unsafe_score": math.nan,
            "unrecognisable_score": None,
            "concept": None,
            "background": None,
            "is_unsafe": True,
            "is_unrecognisable": None,
            "status": "error",
            "error": " ".join(str(error).split())[:500],
        }


def padded(items: Sequence[Any], size: int) -> list[Any]:
    """Repeat the last item up to `size`: equal shapes make a row's bytes independent of its neighbours' number."""
    return [*items, *[items[-1]] * (size - len(items))]


def decode_pictures(data: Sequence[bytes]) -> Any:
    """Return picture files as one uint8 tensor of shape [n, height, width, 3]."""
    import torch

    from safetydpo.diffusion.pictures import decode_picture

    return torch.from_numpy(np.stack([decode_picture(picture) for picture in data]))


class LatentWorker:
    """Encodes stored pictures into latents (posterior mean, optionally its deviation), stored as float16.

    A pass holds `batch_size` pictures, or the largest half of them that fits into memory.
    """

    def __init__(self, base: Mapping[str, Any], batch_size: int, with_deviation: bool = False) -> None:
        from safetydpo.diffusion.build import load_backbone
        from safetydpo.diffusion.memory import PassSize

        self._pass_size, self._with_deviation = PassSize(batch_size), with_deviation
        self._backbone = load_backbone(BaseModelConfig(**base), device=worker_device())

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return `latents` rows."""
        from safetydpo.diffusion.memory import encode_within_memory

        images = table.column("image").to_pylist()
        wanted = self._pass_size.size
        encoded, size = encode_within_memory(images, self._encode, batch_size=wanted)
        if size < wanted:
            logger.warning("latents: %d pictures do not fit into memory at once, %d do", wanted, size)
        self._pass_size.note(size)
        ids = table.column("image_id").to_pylist()
        rows = [{"image_id": i, **latent, "micro_batch": size} for i, latent in zip(ids, encoded, strict=True)]
        return table_from_rows(rows, LATENTS)

    def _decode(self, images: list[bytes]) -> Any:
        return decode_pictures(images)

    def _encode(self, images: list[bytes]) -> list[Made]:
        import torch

        pictures = self._decode(images)
        with torch.no_grad():
            if self._with_deviation:
                means, deviations = self._backbone.encode_image_moments(pictures)
            else:
                means, deviations = self._backbone.encode_images(pictures), None
        return [
            {
                "latent": _half_bytes(means[index]),
                "deviation": None if deviations is None else _half_bytes(deviations[index]),
                "channels": means.shape[1],
                "height": means.shape[2],
                "width": means.shape[3],
            }
            for index in range(len(images))
        ]


class FlippedLatentWorker(LatentWorker):
    """Encodes stored pictures mirrored, left and right exchanged."""

    def _decode(self, images: list[bytes]) -> Any:
        return decode_pictures(images).flip(2)


def _half_bytes(values: Any) -> bytes:
    import torch

    return bytes(values.to(torch.float16).cpu().numpy().tobytes())


class CaptionWorker:
    """Encodes distinct captions into token features, and pooled ones where the family has them, stored as float16."""

    def __init__(self, base: Mapping[str, Any], batch_size: int) -> None:
        from safetydpo.diffusion.build import load_backbone

        self._batch_size = batch_size
        self._backbone = load_backbone(BaseModelConfig(**base), device=worker_device())

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return `text_embeddings` rows."""
        import torch

        captions = padded(table.column("caption").to_pylist(), self._batch_size)
        with torch.no_grad():
            condition = self._backbone.encode_prompts(captions)
        # Padding stays out of the table.
        halves = condition.map(lambda features: features[: table.num_rows].to(torch.float16).cpu())
        rows = [
            {
                "caption_sha256": caption,
                "embedding": halves.tokens[row].numpy().tobytes(),
                "tokens": halves.tokens.shape[1],
                "width": halves.tokens.shape[2],
                "pooled": None if halves.pooled is None else halves.pooled[row].numpy().tobytes(),
                "pooled_width": None if halves.pooled is None else halves.pooled.shape[1],
            }
            for row, caption in enumerate(table.column("caption_sha256").to_pylist())
        ]
        return table_from_rows(rows, TEXT_EMBEDDINGS)
