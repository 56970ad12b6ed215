"""Prompt pairs from a causal language model on this machine: safetensors weights, and never code from a repository."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetydpo.errors import SafetyDPOError
from safetydpo.pairs.writer_messages import write_messages
from safetydpo.pairs.writers import Reply, WriteRequest


class TransformersWriter:
    """One loaded model; requests take turns."""

    def __init__(
        self,
        *,
        model: str,
        revision: str | None,
        device: str,
        dtype: str,
        temperature: float,
        max_tokens: int,
        seed: int,
    ) -> None:
        """Load the model.

        Args:
            model: Local folder in transformers format, or a hub id.
            revision: Of a hub id; None for its default branch.
            device: Such as `cpu` or `cuda`.
            dtype: `float32`, `bfloat16` or `float16`.
            temperature: Of the sampling; 0 takes the likeliest token.
            max_tokens: Of one answer.
            seed: Of the run; each request derives its own.

        Raises:
            SafetyDPOError: if there is no such model, or none with safetensors weights and without own code.
        """
        self._temperature, self._max_tokens, self._seed, self._device = temperature, max_tokens, seed, device
        self._network, self._tokenizer = _load(model, revision=revision, device=device, dtype=dtype)
        self._settings: dict[str, str | int | float | bool | None] = {
            "writer": "transformers",
            "model": _fingerprint(Path(model)) if Path(model).is_dir() else model,
            "revision": getattr(self._network.config, "_commit_hash", None) or revision,
            "dtype": dtype,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        self._name = model
        self._turn = asyncio.Lock()

    @property
    def settings(self) -> Mapping[str, str | int | float | bool | None]:
        """Model (a local one by the hash of its files), type and sampling."""
        return self._settings

    async def write(self, request: WriteRequest) -> Reply:
        """Generate one answer in a thread, so that finished ones are handled meanwhile.

        Raises:
            SafetyDPOError: if the question alone is longer than the model's context.
        """
        async with self._turn:
            return await asyncio.to_thread(self._generate, request)

    async def close(self) -> None:
        """Drop the model."""
        self._network = None

    def _generate(self, request: WriteRequest) -> Reply:
        import torch

        question = self._encode(write_messages(request))
        num_asked = question["input_ids"].shape[1]
        room = getattr(self._network.config, "max_position_embeddings", None) or num_asked + self._max_tokens
        if num_asked >= room:
            raise SafetyDPOError(
                f"expected a question shorter than the {room} tokens that {self._name!r} takes, found {num_asked}: use "
                "a model with a longer context"
            )
        sampling: dict[str, Any] = {"do_sample": False}
        if self._temperature > 0:
            sampling = {"do_sample": True, "temperature": self._temperature, "top_k": 0, "top_p": 1.0}
        limit = min(self._max_tokens, room - num_asked)
        # `generate` draws from the global generator: it is seeded per request and put back.
        devices = [torch.device(self._device)] if self._device.startswith("cuda") else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(request.seed(self._seed))
            output = self._network.generate(
                **question, max_new_tokens=limit, pad_token_id=self._tokenizer.eos_token_id or 0, **sampling
            )
        answer = output[0, num_asked:]
        ends = self._network.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return Reply(
            text=self._tokenizer.decode(answer, skip_special_tokens=True),
            finish_reason="stop" if int(answer[-1]) in ends else "length",
            prompt_tokens=num_asked,
            completion_tokens=len(answer),
            model=self._name,
        )

    def _encode(self, messages: list[dict[str, str]]) -> Any:
        if self._tokenizer.chat_template:
            encoded = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            encoded = self._tokenizer("\n\n".join(part["content"] for part in messages) + "\n", return_tensors="pt")
        return {name: encoded[name].to(self._device) for name in ("input_ids", "attention_mask")}


def _load(model: str, *, revision: str | None, device: str, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only {pickles[0]!r}, which is never read" if pickles else "none"
        raise SafetyDPOError(
            f"expected safetensors weights of a language model in {folder}, found {found}: save the model with "
            "save_pretrained(folder)"
        )
    source = {"revision": revision, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **source)
        network = AutoModelForCausalLM.from_pretrained(
            model, **source, use_safetensors=True, dtype=getattr(torch, dtype)
        )
    except (OSError, ValueError, KeyError) as error:
        raise SafetyDPOError(
            f"expected a causal language model with safetensors weights and no code of its own at {model!r}, found: "
            f"{' '.join(str(error).split())[:300]}; correct --model, or fetch it first"
        ) from error
    return network.to(device).eval(), tokenizer


def _fingerprint(folder: Path) -> str:
    """Return sha256 over the names and contents of the files that say what the model answers."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".txt", ".model"):
            with path.open("rb") as file:
                total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
