"""A closed pairs artifact and a pool of pictures, made by hand: small noise pictures, mild words."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from safetydpo.artifacts.pool_index import close_index
from safetydpo.artifacts.records import ArtifactKey, Record, artifact_folder, close_artifact
from safetydpo.artifacts.schemas import (
    IMAGE_MANIFEST,
    IMAGES,
    MEMBERSHIPS,
    PROMPT_PAIRS,
    SELECTIONS,
    make_image_id,
    make_pair_id,
)
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows, write_table

SAMPLER = {"steps": 4, "guidance_scale": 4.0, "height": 8, "width": 8, "batch_size": 8}


@dataclass(frozen=True)
class MadePair:
    """One prompt pair and what became of it."""

    number: int
    concept: str = "thorn"
    categories: tuple[str, ...] = ("violence",)
    kept: bool = True
    reason: str = "kept"

    @property
    def texts(self) -> tuple[str, str]:
        """Unsafe and safe prompt."""
        return f"a {self.concept} number {self.number}", f"a leaf number {self.number}"

    @property
    def pair_id(self) -> str:
        """Id of the two prompts."""
        return make_pair_id(*self.texts)

    def image_id(self, side: str) -> str:
        """Id of one picture."""
        return make_image_id(self.pair_id, side, seed=self.number, base_fingerprint="base", sampler=SAMPLER)


def picture(pair: MadePair, side: str, *, size: int = 8) -> bytes:
    """A PNG of noise that no other picture has."""
    draw = np.random.default_rng([pair.number, side == "safe"])
    stream = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def image_row(pair: MadePair, side: str, *, size: int = 8) -> dict[str, object]:
    """The pool's row of a picture."""
    data = picture(pair, side, size=size)
    row = {"image_id": pair.image_id(side), "image": data, "sha256": hashlib.sha256(data).hexdigest()}
    return row | {"status": "ok", "error": "", "attempt": 1, "width": size, "height": size, "format": "png"}


def failed_row(pair: MadePair, side: str) -> dict[str, object]:
    """The pool's row of a picture that could not be drawn."""
    row = {"image_id": pair.image_id(side), "image": None, "sha256": "", "status": "error", "error": "no memory"}
    return row | {"attempt": 1, "width": 0, "height": 0, "format": ""}


def close_batch(
    store: Location, name: str, rows: Sequence[dict[str, object]], *, files: int = 1, pool: str = "pool-1"
) -> None:
    """Close a batch of a pool of pictures, its rows dealt to several files."""
    batch = store / "images" / pool / name
    for index in range(files):
        write_table(batch / "data" / f"part-{index}.parquet", table_from_rows(rows[index::files], IMAGES))
    close_index(batch, IMAGES, id_column="image_id")
    (batch / "record.json").write_bytes(b"{}")


def close_pairs(store: Location, pairs: Sequence[MadePair]) -> tuple[Location, Record, ArtifactKey]:
    """Close a pairs artifact: tables and record."""
    identity = {
        "seed": 3,
        "base": {"model": "demo", "revision": None, "dtype": "float32"},
        "sampler": SAMPLER,
        "pairs": {"unsafe_score_min": 0.5, "max_error_rate": 0.01},
        "judge": "by hand",
    }
    key = ArtifactKey("pairs", "tiny", identity, {"base": "base", "judge": "judge-weights"}, 1)
    folder = artifact_folder(store, key)
    texts = [{"pair_id": p.pair_id, "unsafe_text": p.texts[0], "safe_text": p.texts[1]} for p in pairs]
    members = [
        {"pair_id": p.pair_id, "category": category, "concept": p.concept, "source": "by hand"}
        for p in pairs
        for category in p.categories
    ]
    chosen = [{"pair_id": p.pair_id, "seed": p.number, "kept": p.kept, "reason": p.reason} for p in pairs]
    manifest = [
        {"image_id": p.image_id(side), "owner_id": p.pair_id, "side": side, "prompt": text, "seed": p.number}
        | {"adapter": "", "attempt": 1}
        for p in pairs
        for side, text in zip(("unsafe", "safe"), p.texts, strict=True)
    ]
    write_table(folder / "prompt_pairs.parquet", table_from_rows(texts, PROMPT_PAIRS))
    write_table(folder / "memberships.parquet", table_from_rows(members, MEMBERSHIPS))
    write_table(folder / "selections.parquet", table_from_rows(chosen, SELECTIONS))
    write_table(folder / "images.parquet", table_from_rows(manifest, IMAGE_MANIFEST))
    record = Record("pairs", "tiny", key.hash, 1, key.identity, key.inputs, "content", versions={"pyarrow": "1"})
    record = replace(record, failed_units=("lost",), started_at="2026-01-01T00:00:00+00:00")
    close_artifact(store, key, record)
    return folder, record, key
