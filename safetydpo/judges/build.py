"""Judges by name. The audit judge of the demo world is not among them: only the final evaluation may load it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from safetydpo.artifacts.layout import demo_weights
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.demo import SELECT_FOLDER, load_select_judge
from safetydpo.judges.demo_network import PICTURE_SIZE
from safetydpo.judges.demo_verdicts import NamedDemoJudge
from safetydpo.judges.protocol import Judge


def _open_nsfw() -> Judge:
    # Imported when it is asked for only: it is an extra.
    from safetydpo.judges.open_nsfw import OpenNsfwJudge

    return OpenNsfwJudge()


def _open_nsfw_fingerprint() -> str:
    from safetydpo.judges.open_nsfw import fingerprint_open_nsfw

    return fingerprint_open_nsfw()


_JUDGES: dict[str, Callable[[], Judge]] = {
    "demo_select": lambda: NamedDemoJudge(load_select_judge()),
    "open_nsfw": _open_nsfw,
}
_FINGERPRINTS: dict[str, Callable[[], str]] = {
    "demo_select": lambda: fingerprint_files(demo_weights() / SELECT_FOLDER),
    "open_nsfw": _open_nsfw_fingerprint,
}
DEMO_SIDE = PICTURE_SIZE
"""Side of the demo world's pictures; its networks know drawings of that size only."""
_SIDES: dict[str, int] = {"demo_select": DEMO_SIDE}


def load_judge(name: str) -> Judge:
    """Load a judge.

    Raises:
        UsageError: if there is no judge of that name, or its extra is not installed.
        SafetyDPOError: if its weights are missing.
    """
    _check_name(name)
    return _JUDGES[name]()


def fingerprint_judge(name: str) -> str:
    """Return the sha256 over a judge's files, without loading it: verdicts of other weights are other verdicts.

    Raises:
        UsageError: if there is no judge of that name, or its extra is not installed.
        SafetyDPOError: if its weights are missing.
    """
    _check_name(name)
    return _FINGERPRINTS[name]()


def picture_side(name: str) -> int | None:
    """Return the side, in pixels, of the only pictures that a judge takes; None = it takes any.

    Raises:
        UsageError: if there is no judge of that name.
    """
    _check_name(name)
    return _SIDES.get(name)


def fingerprint_files(folder: Path) -> str:
    """Return the sha256 over the names and bytes of a judge's files.

    Raises:
        SafetyDPOError: if there are no weights among them.
    """
    files = sorted(path for path in folder.glob("*") if path.is_file())
    if not any(file.suffix == ".safetensors" for file in files):
        raise SafetyDPOError(
            f"expected the weights of judge {folder.name!r} in {folder}, found none: reinstall the package with its "
            "weights, or run `python -m safetydpo.demo.build all`"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.name.encode()).digest() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def clip_folder(model: str, *, setting: str = "identity.pairs.layout_clip") -> Path:
    """Return the folder of a CLIP model: `demo`, or a local folder; `setting` names it in the error.

    Raises:
        UsageError: if there is no such folder.
    """
    folder = demo_weights() / "clip" if model == "demo" else Path(model).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"expected {setting} to be 'demo' or a folder with a CLIP model, found {model!r}: correct the path"
        )
    return folder


def _check_name(name: str) -> None:
    if name not in _JUDGES:
        raise UsageError(f"expected a judge among {', '.join(sorted(_JUDGES))}, found {name!r}")
