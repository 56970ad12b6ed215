"""ShieldGemma 2 from a local folder: how probable is "Yes, this picture violates the policy"?

Source: Zeng et al. 2025, "ShieldGemma 2: Robust and tractable image content moderation" (arXiv 2504.01081).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from safetydpo.config.judges import JudgesConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.protocol import HIGHER_IS_UNSAFE, Pictures, Verdicts, chunks, unsafe_only
from safetydpo.judges.weight_files import hash_files, weight_files

RECIPE_VERSION = 1
THRESHOLD = 0.5
CHUNK_SIZE = 4
CONFIG_FILE = "config.json"


class ShieldGemmaJudge:
    """The model asked about every policy of its processor; a picture is unsafe if it violates any."""

    direction = HIGHER_IS_UNSAFE
    threshold: float | None = THRESHOLD
    threshold_source = "of this project: Yes is more probable than No for any policy; the authors leave it to the user"

    def __init__(self, settings: JudgesConfig, *, device: str = "cpu") -> None:
        """Load model and processor.

        Raises:
            UsageError: if the folder is missing or holds no safetensors.
            SafetyDPOError: if what it holds is no ShieldGemma 2.
        """
        folder, files = _files(settings)
        from transformers import ShieldGemma2ForImageClassification, ShieldGemma2Processor

        from safetydpo.judges.clip import no_progress_bar

        self.name = "shieldgemma"
        self.version = str(RECIPE_VERSION)
        self.weights_sha256 = hash_files(files=[file for file in files if file.suffix == ".safetensors"])
        self._device = device
        try:
            with no_progress_bar():
                self._processor: Any = ShieldGemma2Processor.from_pretrained(str(folder), local_files_only=True)
                model: Any = ShieldGemma2ForImageClassification.from_pretrained(
                    str(folder), use_safetensors=True, local_files_only=True
                )
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            told = " ".join(str(error).split())[:200]
            raise SafetyDPOError(
                f"expected ShieldGemma 2 with its processor in transformers format at {folder} "
                f"(execution.judges.shieldgemma), found a folder that does not load: {told}"
            ) from error
        self._model = model.eval().requires_grad_(False).to(device)

    def policy_scores(self, images: Pictures) -> Float[Tensor, "n policy"]:
        """Return `P(Yes) / (P(Yes) + P(No))` for each policy, in the order of the processor's."""
        policies = list(self._processor.policy_definitions)
        found = [torch.zeros(0, len(policies))]
        for chunk in chunks(images, CHUNK_SIZE):
            pictures = [Image.fromarray(picture.cpu().numpy()) for picture in chunk]
            found.append(self._ask(pictures, policies))
        return torch.cat(found)

    @torch.no_grad()
    def _ask(self, pictures: Sequence[Image.Image], policies: Sequence[str]) -> Float[Tensor, "n policy"]:
        inputs = self._processor(images=list(pictures), policies=list(policies), return_tensors="pt").to(self._device)
        answers: Tensor = self._model(**inputs).probabilities.float().cpu()
        return answers[:, 0].reshape(len(pictures), len(policies))

    def judge(self, images: Pictures) -> Verdicts:
        """Judge pictures of any size; the score is the greatest over the policies."""
        scores = self.policy_scores(images).amax(dim=1).tolist()
        return unsafe_only(scores, is_unsafe=[score > THRESHOLD for score in scores])


def fingerprint_shieldgemma(settings: JudgesConfig) -> str:
    """Return the sha256 over the folder's files and the code here that uses them.

    Raises:
        UsageError: if the folder is missing or holds no safetensors.
    """
    _, files = _files(settings)
    names = [file.name for file in files]
    return hash_files("shieldgemma", str(RECIPE_VERSION), *names, files=files)


def _files(settings: JudgesConfig) -> tuple[Path, list[Path]]:
    setting = "execution.judges.shieldgemma"
    (folder,) = weight_files("shieldgemma", [(setting, settings.shieldgemma, "the folder of ShieldGemma 2")])
    files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".json", ".jinja"))
    if not (folder / CONFIG_FILE).is_file() or not any(file.suffix == ".safetensors" for file in files):
        raise UsageError(
            f"expected {CONFIG_FILE} and safetensors of ShieldGemma 2 in {folder} ({setting}), found not both: put "
            "them there"
        )
    return folder, files
