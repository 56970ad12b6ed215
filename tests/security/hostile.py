"""What an attacker would hand in: pickles that leave a mark when they are read."""

from __future__ import annotations

import io
import pickle  # noqa: TID251 (written, never read)
import zipfile
from pathlib import Path


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self._marker), "w"))


def malicious_pickle(marker: Path) -> bytes:
    """Return a pickle that creates `marker` when anybody loads it."""
    return pickle.dumps({"state_dict": _Touch(marker)})


def malicious_zip(marker: Path) -> bytes:
    """Return the same in the archive that `torch.save` writes today."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("archive/data.pkl", malicious_pickle(marker))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return sink.getvalue()
