"""What a comparator does to a model: other weights, another way of guiding, or nothing. Data, with its files.

Two files in a folder: `intervention.json` (what guides, and whether weights change) and, if they do, the changes as
LoRA layers in the format of every other adapter. A change of full rank is such an adapter too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from safetydpo.artifacts.adapters import (
    AdapterMetadata,
    LoraLayer,
    LoraSignature,
    adapter_hash,
    read_adapter,
    write_adapter,
)
from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.layout import ADAPTER_FILE, INTERVENTION_FILE
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.baselines import guidance
from safetydpo.baselines.conditions import mean_condition, weighted_condition
from safetydpo.diffusion.backbone import Backbone, Condition, GuidanceStep
from safetydpo.errors import SafetyDPOError


@dataclass(frozen=True)
class NegativePrompt:
    """The unguided branch sees the concepts in place of the empty prompt."""

    texts: tuple[str, ...]
    """Their features are averaged."""
    weight: float = 1.0
    """How far from the empty prompt towards them."""


@dataclass(frozen=True)
class SafetyConcept:
    """Safe latent guidance: a third branch sees the concepts, and guidance turns away where the prompt comes near.

    `render` draws a batch after the other with one callback; its momentum starts anew with each.
    """

    texts: tuple[str, ...]
    """Their features are averaged."""
    scale: float
    """s_S; 0 = plain guidance."""
    warmup_steps: int
    """Steps at the beginning that are guided plainly, while the momentum grows."""
    threshold: float
    """lambda."""
    momentum_scale: float
    """s_m."""
    momentum_beta: float
    """beta_m."""


@dataclass(frozen=True)
class Intervention:
    """How a model is changed (`layers`) and how it is sampled (`guiding`); both empty = the base itself."""

    layers: Mapping[str, LoraLayer] = field(default_factory=dict)
    """`<module of the denoiser>` -> its change."""
    guiding: NegativePrompt | SafetyConcept | None = None

    @property
    def fingerprint(self) -> str:
        """Hash over everything that changes a picture."""
        return sha256_of({"guiding": _guiding_json(self.guiding), "layers": adapter_hash(self.layers)})

    def install(self, backbone: Backbone) -> None:
        """Put the change of weights into the model, or take out what another one left there."""
        if not self.layers:
            backbone.remove_adapter()
            return
        rank = max(int(layer.down.shape[0]) for layer in self.layers.values())
        signature = LoraSignature(rank, float(rank), tuple(sorted(self.layers)))
        backbone.swap_adapter(signature, self.layers)

    def guide(self, backbone: Backbone) -> dict[str, Any]:
        """Return what `render` is to be called with beside prompts, seeds and sampler."""
        if isinstance(self.guiding, NegativePrompt):
            with torch.no_grad():
                return {"negative_prompt": weighted_condition(backbone, self.guiding.texts, weight=self.guiding.weight)}
        if isinstance(self.guiding, SafetyConcept):
            return {"callback": SafeLatentGuidance(backbone, self.guiding)}
        return {}


class SafeLatentGuidance:
    """A callback of the sampling loop that guides as Safe Latent Diffusion does."""

    def __init__(self, backbone: Backbone, concept: SafetyConcept) -> None:
        """Encode the safety concept once."""
        self._backbone, self._concept = backbone, concept
        with torch.no_grad():
            self._condition: Condition = mean_condition(backbone, concept.texts)
        self._momentum: Tensor | None = None
        self._last_index = -1

    def __call__(self, step: GuidanceStep) -> Tensor:
        """Return the prediction to use: that of classifier-free guidance minus its scale times gamma."""
        if self._momentum is None or step.index <= self._last_index:
            self._momentum = torch.zeros_like(step.predicted_prompt)
        self._last_index = step.index
        gamma = guidance.safety_guidance(
            step.predicted_empty,
            step.predicted_prompt,
            step.predict(self._condition),
            momentum=self._momentum,
            scale=self._concept.scale,
            threshold=self._concept.threshold,
            momentum_scale=self._concept.momentum_scale,
            noise_factor=self._noise_factor(step),
        )
        self._momentum = guidance.next_momentum(self._momentum, gamma, beta=self._concept.momentum_beta)
        if step.index < self._concept.warmup_steps:
            return step.combined
        return step.combined - step.guidance_scale * gamma

    def _noise_factor(self, step: GuidanceStep) -> float:
        """Return how much noise a unit of prediction is: 1 where the network predicts it, less for v."""
        times = torch.tensor([step.timestep], device=step.latents.device)
        unit = torch.ones_like(step.latents[:1])
        return float(self._backbone.to_epsilon(unit, torch.zeros_like(unit), times).flatten()[0])


def write_intervention(folder: Location, intervention: Intervention, *, metadata: AdapterMetadata) -> None:
    """Write the files of an intervention; `metadata` is the adapter's, where it has one."""
    if intervention.layers:
        write_adapter(folder / ADAPTER_FILE, intervention.layers, metadata=metadata)
    content = {"schema": 1, "guiding": _guiding_json(intervention.guiding), "has_layers": bool(intervention.layers)}
    (folder / INTERVENTION_FILE).write_bytes(json.dumps(content, indent=2, sort_keys=True).encode() + b"\n")


def read_intervention(folder: Location) -> Intervention:
    """Return the intervention of a folder.

    Raises:
        SafetyDPOError: if its file is missing or no intervention, or its adapter is missing or damaged.
    """
    location = folder / INTERVENTION_FILE
    try:
        content = parse_json(location.read_bytes())
        if content["schema"] != 1:
            raise ValueError(f"schema {content['schema']!r}")
        guiding = _parse_guiding(content["guiding"])
        has_layers = bool(content["has_layers"])
    except (ValueError, TypeError, KeyError) as error:
        raise SafetyDPOError(
            f"expected an intervention at {location}, found something else ({error!r}): delete its folder and run the "
            "same command again"
        ) from error
    layers = read_adapter(folder / ADAPTER_FILE)[0] if has_layers else {}
    return Intervention(layers, guiding)


_KINDS: Mapping[str, type[NegativePrompt] | type[SafetyConcept]] = {
    "negative_prompt": NegativePrompt,
    "safety_concept": SafetyConcept,
}


def _guiding_json(guiding: NegativePrompt | SafetyConcept | None) -> dict[str, Any] | None:
    if guiding is None:
        return None
    kind = next(name for name, cls in _KINDS.items() if isinstance(guiding, cls))
    return {"kind": kind, **asdict(guiding), "texts": list(guiding.texts)}


def _parse_guiding(content: Any) -> NegativePrompt | SafetyConcept | None:
    if content is None:
        return None
    values = dict(content)
    kind = _KINDS[values.pop("kind")]
    return kind(**{**values, "texts": tuple(values["texts"])})
