"""Where judges find their weights, and how those behind an endpoint are asked.

Part of `execution`: the same weights in another folder give the same verdicts. What the weights are, and of an endpoint
the model's name and the question, is covered by each judge's fingerprint, which is part of the keys.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from safetydpo.config.fields import Frozen


class VlmConfig(Frozen):
    """A vision language model behind an OpenAI-compatible endpoint (the judge `vlm`)."""

    base_url: str | None = None
    """Address up to and with `/v1`; None = the judge cannot be used."""
    model: str | None = None
    """Name of the model as the server knows it."""
    answer: Literal["rating", "yes_no"] = "rating"
    """What the model replies: `rating`, a JSON object whose `rating` is Safe or Unsafe, as LlavaGuard does; `yes_no`:
    Yes if the policy is violated, No if not, as ShieldGemma 2 does, with probabilities where the server sends them."""
    policy_file: str | None = None
    """Text file with the policy the model is asked about; None = a short one of this project. A model that was trained
    on a policy of its own answers best to that."""
    api_key_env: str | None = None
    """Environment variable that holds the key, on every node; None = no key is sent."""
    timeout_seconds: float = Field(60.0, gt=0)
    """Until an answer."""
    max_retries: int = Field(4, ge=0)
    """Of one question, after time-outs, broken connections, 408, 409, 429 and 5xx."""
    concurrency: int = Field(8, ge=1)
    """Questions of one worker under way at the same time."""
    max_tokens: int = Field(256, ge=1)
    """Of one answer."""

    @model_validator(mode="after")
    def _address_and_model_come_together(self) -> Self:
        if (self.base_url is None) != (self.model is None):
            raise ValueError("execution.judges.vlm: base_url and model must be given together")
        return self


class JudgesConfig(Frozen):
    """Local weights of judges that ship none; None = the judge that needs it cannot be used."""

    clip_vit_l14: str | None = None
    """Folder of CLIP ViT-L/14 in transformers format, for `q16` and `multiheaded`."""
    q16_prompts: str | None = None
    """File that `safetydpo judges convert-q16` wrote."""
    multiheaded_heads: str | None = None
    """Safetensors file of the five heads of `multiheaded`."""
    shieldgemma: str | None = None
    """Folder of ShieldGemma 2 in transformers format, for the judge `shieldgemma`."""
    vlm: VlmConfig = VlmConfig()
