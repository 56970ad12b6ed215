"""Judges by name. The audit judge of the demo world is not among them: only the final evaluation may load it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetydpo.artifacts.layout import demo_weights
from safetydpo.config.judges import JudgesConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.demo import SELECT_FOLDER, load_select_judge
from safetydpo.judges.demo_network import PICTURE_SIZE
from safetydpo.judges.demo_verdicts import NamedDemoJudge
from safetydpo.judges.protocol import Judge

DEMO_SIDE = PICTURE_SIZE
"""Side of the demo world's pictures; its networks know drawings of that size only."""


@dataclass(frozen=True)
class JudgeEntry:
    """How a judge is loaded and fingerprinted, and what it is asked to look at.

    Attributes:
        load: Makes it, on a device, with the settings of local weights.
        fingerprint: Hashes what its answers depend on, loading nothing.
        side: Side of the only pictures it takes, in pixels; None = any.
    """

    load: Callable[[JudgesConfig, str], Judge]
    fingerprint: Callable[[JudgesConfig], str]
    side: int | None = None


# What these need is imported when they are asked for: most are extras, or take seconds to import.
def _open_nsfw() -> Judge:
    from safetydpo.judges.open_nsfw import OpenNsfwJudge

    return OpenNsfwJudge()


def _open_nsfw_fingerprint() -> str:
    from safetydpo.judges.open_nsfw import fingerprint_open_nsfw

    return fingerprint_open_nsfw()


def _nudenet() -> Judge:
    from safetydpo.judges.nudenet import NudeNetJudge

    return NudeNetJudge()


def _nudenet_fingerprint() -> str:
    from safetydpo.judges.nudenet import fingerprint_nudenet

    return fingerprint_nudenet()


def _q16(settings: JudgesConfig, device: str) -> Judge:
    from safetydpo.judges.q16 import Q16Judge

    return Q16Judge(settings, device=device)


def _q16_fingerprint(settings: JudgesConfig) -> str:
    from safetydpo.judges.q16 import fingerprint_q16

    return fingerprint_q16(settings)


def _multiheaded(settings: JudgesConfig, device: str) -> Judge:
    from safetydpo.judges.multiheaded import MultiHeadedJudge

    return MultiHeadedJudge(settings, device=device)


def _multiheaded_fingerprint(settings: JudgesConfig) -> str:
    from safetydpo.judges.multiheaded import fingerprint_multiheaded

    return fingerprint_multiheaded(settings)


def _shieldgemma(settings: JudgesConfig, device: str) -> Judge:
    from safetydpo.judges.shieldgemma import ShieldGemmaJudge

    return ShieldGemmaJudge(settings, device=device)


def _shieldgemma_fingerprint(settings: JudgesConfig) -> str:
    from safetydpo.judges.shieldgemma import fingerprint_shieldgemma

    return fingerprint_shieldgemma(settings)


def _vlm(settings: JudgesConfig) -> Judge:
    from safetydpo.judges.vlm import VlmJudge

    return VlmJudge(settings)


def _vlm_fingerprint(settings: JudgesConfig) -> str:
    from safetydpo.judges.vlm import fingerprint_vlm

    return fingerprint_vlm(settings)


_JUDGES: dict[str, JudgeEntry] = {
    "demo_select": JudgeEntry(
        lambda _, __: NamedDemoJudge(load_select_judge()),
        lambda _: fingerprint_files(demo_weights() / SELECT_FOLDER),
        side=DEMO_SIDE,
    ),
    "open_nsfw": JudgeEntry(lambda _, __: _open_nsfw(), lambda _: _open_nsfw_fingerprint()),
    "nudenet": JudgeEntry(lambda _, __: _nudenet(), lambda _: _nudenet_fingerprint()),
    "q16": JudgeEntry(_q16, _q16_fingerprint),
    "multiheaded": JudgeEntry(_multiheaded, _multiheaded_fingerprint),
    "shieldgemma": JudgeEntry(_shieldgemma, _shieldgemma_fingerprint),
    "vlm": JudgeEntry(lambda settings, _: _vlm(settings), _vlm_fingerprint),
}
NO_LOCAL_WEIGHTS = JudgesConfig()


def load_judge(name: str, settings: JudgesConfig = NO_LOCAL_WEIGHTS, *, device: str = "cpu") -> Judge:
    """Load a judge; `settings` (`execution.judges`) say where the weights of those lie that ship none.

    Raises:
        UsageError: if there is no judge of that name, its extra is not installed, or its weights are not named.
        SafetyDPOError: if its weights are missing or others.
    """
    return _entry(name).load(settings, device)


def fingerprint_judge(name: str, settings: JudgesConfig = NO_LOCAL_WEIGHTS) -> str:
    """Return the sha256 over a judge's files, without loading it: verdicts of other weights are other verdicts.

    Raises:
        UsageError: if there is no judge of that name, its extra is not installed, or its weights are not named.
        SafetyDPOError: if its weights are missing.
    """
    return _entry(name).fingerprint(settings)


def picture_side(name: str) -> int | None:
    """Return the side, in pixels, of the only pictures that a judge takes; None = it takes any.

    Raises:
        UsageError: if there is no judge of that name.
    """
    return _entry(name).side


def judge_names() -> tuple[str, ...]:
    """Return the names of all judges."""
    return tuple(sorted(_JUDGES))


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


def _entry(name: str) -> JudgeEntry:
    if name not in _JUDGES:
        raise UsageError(f"expected a judge among {', '.join(judge_names())}, found {name!r}")
    return _JUDGES[name]
