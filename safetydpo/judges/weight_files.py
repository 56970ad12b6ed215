"""Where the weights of judges that ship none lie, and hashes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetydpo.errors import UsageError

LARGE_BYTES = 50_000_000
CLIP_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


def weight_files(judge: str, paths: Sequence[tuple[str, str | None, str]]) -> list[Path]:
    """Return the paths that a judge needs, each given as (setting, value, what belongs there).

    Raises:
        UsageError: naming the judge, the first setting that is missing or leads nowhere, and what belongs there.
    """
    found = []
    for setting, value, content in paths:
        if value is None:
            raise UsageError(
                f"expected {setting} for judge {judge!r}, found none: name {content} (docs/judges.md says where to get "
                "it), or choose other judges"
            )
        path = Path(value).expanduser()
        if not path.exists():
            raise UsageError(f"expected {content} at {path} ({setting}), found nothing: correct the path")
        found.append(path)
    return found


def clip_files(judge: str, folder: Path) -> list[Path]:
    """Return the files of a CLIP folder that its picture tower is made of.

    Raises:
        UsageError: if one of them is missing.
    """
    for name in CLIP_FILES:
        if not (folder / name).is_file():
            raise UsageError(
                f"expected a CLIP model in transformers format at {folder} (execution.judges.clip_vit_l14) for judge "
                f"{judge!r}, found no {name}: put it there"
            )
    return [folder / name for name in CLIP_FILES]


def hash_files(*parts: str, files: Sequence[Path]) -> str:
    """Return the sha256 over words and the content of files, wherever they lie."""
    digest = hashlib.sha256()
    for text in (*parts, *(hash_file(file) for file in files)):
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def hash_file(file: Path) -> str:
    """Return the sha256 of a file; of a large one that has not changed since, without reading it again."""
    state = file.stat()
    if state.st_size < LARGE_BYTES:
        return _hash_content(file)
    return _hash_large(file.resolve(), (state.st_size, state.st_mtime_ns))


@lru_cache(maxsize=64)
def _hash_large(file: Path, _state: Any) -> str:
    return _hash_content(file)


def _hash_content(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
