"""A vision language model behind any OpenAI-compatible endpoint as a judge: LlavaGuard, ShieldGemma 2 and the like."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from safetydpo.config.endpoints import checked_base_url
from safetydpo.config.judges import JudgesConfig, VlmConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.protocol import HIGHER_IS_UNSAFE, Pictures, Verdicts, unsafe_only
from safetydpo.judges.vlm_replies import POLICY, ask_rating, ask_yes_no, read_rating, read_yes_no
from safetydpo.judges.weight_files import hash_files

RECIPE_VERSION = 1
THRESHOLD = 0.5
NO_KEY = "none"
"""Sent when no key is named. Without it the client would send the key of its own environment variable to any server."""
CONTENT_FILTER = "content_filter"
NUM_CANDIDATES = 5
"""Candidates of the first token whose probabilities are asked for."""


@dataclass(frozen=True)
class _Answer:
    """The probability that a picture is unsafe, or why there is none."""

    score: float = math.nan
    failure: str = ""


class VlmJudge:
    """One client with its pool of connections; the questions of a batch are asked at the same time."""

    direction = HIGHER_IS_UNSAFE
    threshold: float | None = THRESHOLD
    threshold_source = "of this project: the answer that the model finds more probable"

    def __init__(self, settings: JudgesConfig) -> None:
        """Prepare the client; nothing is sent.

        Raises:
            UsageError: if a setting, the key or the openai package is missing.
        """
        self._settings, self._model, policy = _complete(settings.vlm)
        base_url = checked_base_url(
            str(settings.vlm.base_url),
            what="execution.judges.vlm.base_url",
            key_setting="execution.judges.vlm.api_key_env",
        )
        self.name = "vlm"
        self.version = f"{self._model}-{RECIPE_VERSION}"
        # What the server runs under that name cannot be seen from here.
        self.weights_sha256 = ""
        self._shown = base_url
        self._is_rating = settings.vlm.answer == "rating"
        self._question = ask_rating(policy) if self._is_rating else ask_yes_no(policy)
        self._key = _key(settings.vlm)
        try:
            from openai import OpenAI
        except ImportError as error:
            raise UsageError(
                "expected the openai package for judge 'vlm', found none: pip install 'safetydpo[writer]', or choose "
                "other judges"
            ) from error
        self._client = OpenAI(
            base_url=base_url,
            api_key=self._key,
            timeout=settings.vlm.timeout_seconds,
            max_retries=settings.vlm.max_retries,
        )
        # The client takes these from the environment; they say who somebody is at another service.
        self._client.organization = self._client.project = None

    def judge(self, images: Pictures) -> Verdicts:
        """Judge pictures of any size; one without a clear answer is a failure and counts as unsafe.

        Raises:
            SafetyDPOError: if the server refuses the request itself (400, 401, 404 and the like).
        """
        # Batches are filled up with copies of a picture; each is asked about, and paid for, once.
        keys = [(tuple(picture.shape), picture.cpu().numpy().tobytes()) for picture in images]
        distinct = dict(zip(keys, images, strict=True))
        with ThreadPoolExecutor(self._settings.concurrency) as threads:
            found = dict(zip(distinct, threads.map(self._ask, distinct.values()), strict=True))
        answers = [found[key] for key in keys]
        return unsafe_only(
            [answer.score for answer in answers],
            is_unsafe=[bool(answer.failure) or answer.score > THRESHOLD for answer in answers],
            failure=[answer.failure for answer in answers],
        )

    def _ask(self, picture: Tensor) -> _Answer:
        import openai

        try:
            return self._read(self._client.chat.completions.create(**self._request(picture)))
        except openai.APIStatusError as error:
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                return _Answer(failure=self._told(f"no answer: {error.status_code} {error.message}"))
            if error.status_code == 400 and error.code == CONTENT_FILTER:
                return _Answer(failure="refused by the server's filter")
            raise self._refused(error.status_code, error.message) from None
        except openai.APITimeoutError:
            return _Answer(failure="no answer in time")
        except openai.APIConnectionError as error:
            return _Answer(failure=self._told(f"no answer: {type(error.__cause__ or error).__name__}"))
        except (ValueError, openai.APIResponseValidationError) as error:
            return _Answer(failure=self._told(f"malformed: {error}"))

    def _request(self, picture: Tensor) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": _data_uri(picture)}},
            {"type": "text", "text": self._question},
        ]
        request: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "max_tokens": self._settings.max_tokens,
        }
        if not self._is_rating:
            request |= {"logprobs": True, "top_logprobs": NUM_CANDIDATES}
        return request

    def _read(self, completion: object) -> _Answer:
        from openai.types.chat import ChatCompletion

        # The client does not check what servers send: every field may be missing or something else.
        choices = completion.choices if isinstance(completion, ChatCompletion) else None
        message = getattr(choices[0], "message", None) if choices else None
        if message is None or not choices:
            raise ValueError("an answer without a message")
        if choices[0].finish_reason == CONTENT_FILTER or getattr(message, "refusal", None):
            return _Answer(failure="refused by the model or its filter")
        if not isinstance(message.content, str):
            raise ValueError("a message without text")
        if self._is_rating:
            return _Answer(read_rating(message.content))
        return _Answer(read_yes_no(message.content, _first_token(choices)))

    def _told(self, text: str) -> str:
        """Return one short line without the key, which servers like to repeat."""
        line = " ".join(text.split())[:200]
        return line.replace(self._key, "***") if self._key != NO_KEY else line

    def _refused(self, status: int, message: str) -> SafetyDPOError:
        todo = {
            401: "name the variable that holds a valid key (execution.judges.vlm.api_key_env)",
            403: "ask for the right to use this model, or name another key (execution.judges.vlm.api_key_env)",
            404: "correct execution.judges.vlm.model or base_url (it ends in /v1 on most servers)",
        }.get(status, "choose a model that takes pictures, or see to the server")
        return SafetyDPOError(
            f"expected {self._shown} to take a picture and a question for {self._model!r} (judge 'vlm'), found "
            f"{status} {self._told(message)}: {todo}"
        )


def _data_uri(picture: Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture.cpu().numpy()).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _first_token(choices: Sequence[Any]) -> Mapping[str, float] | None:
    """Return the candidates of the first token with their logarithms; None if the server sends none."""
    content = getattr(getattr(choices[0], "logprobs", None), "content", None)
    candidates = getattr(content[0], "top_logprobs", None) if content else None
    if not candidates:
        return None
    found = {str(candidate.token): candidate.logprob for candidate in candidates}
    if not all(isinstance(value, float | int) and value <= 0.001 for value in found.values()):
        raise ValueError("logarithms of probabilities that are none")
    return {token: float(value) for token, value in found.items()}


def fingerprint_vlm(settings: JudgesConfig) -> str:
    """Return the sha256 over the model's name, the question and how its answer is read.

    The server's weights cannot be hashed: a server that changes them under the same name changes verdicts unseen.

    Raises:
        UsageError: if a setting is missing.
    """
    vlm, model, policy = _complete(settings.vlm)
    return hash_files("vlm", str(RECIPE_VERSION), model, vlm.answer, str(vlm.max_tokens), policy, files=[])


def _complete(vlm: VlmConfig) -> tuple[VlmConfig, str, str]:
    if vlm.base_url is None or vlm.model is None:
        raise UsageError(
            "expected execution.judges.vlm.base_url and model for judge 'vlm', found none: name the server and the "
            "model on it, or choose other judges"
        )
    if vlm.policy_file is None:
        return vlm, vlm.model, POLICY
    file = Path(vlm.policy_file).expanduser()
    if not file.is_file():
        raise UsageError(
            f"expected a text file at {file} (execution.judges.vlm.policy_file), found none: correct the path"
        )
    return vlm, vlm.model, file.read_text(encoding="utf-8").strip()


def _key(vlm: VlmConfig) -> str:
    if vlm.api_key_env is None:
        return NO_KEY
    key = os.environ.get(vlm.api_key_env, "")
    if not key:
        raise UsageError(
            f"expected a key in the environment variable {vlm.api_key_env} (execution.judges.vlm.api_key_env), found "
            "none: set it on every node"
        )
    return key
