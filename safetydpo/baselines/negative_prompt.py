"""The base model with the concepts' names as its negative prompt."""

from __future__ import annotations

import torch

from safetydpo.baselines.conditions import name_lists
from safetydpo.baselines.intervention import Intervention, NegativePrompt
from safetydpo.baselines.protocol import Erasure, chosen, number, require_unet
from safetydpo.baselines.settings import Choice, Range, Settings, Space
from safetydpo.config.schema import SamplerConfig
from safetydpo.diffusion.backbone import Backbone


class NegativePromptComparator:
    """The unguided branch of classifier-free guidance sees the concepts: `eps_neg + s (eps_p - eps_neg)`.

    Source: Ho and Salimans 2022 (arXiv 2207.12598), equation 6, with a prompt in place of the empty one, as the
    pipelines of diffusers do with `negative_prompt`.
    """

    name = "negative_prompt"
    paper = "Ho and Salimans 2022, Classifier-Free Diffusion Guidance, arXiv 2207.12598"
    space = Space(
        settings={"joined": Choice(("list", "single")), "weight": Range(0.25, 4.0, log=True)},
        first=({"joined": "list", "weight": 1.0}, {"joined": "single", "weight": 1.0}),
    )

    def prepare(
        self,
        backbone: Backbone,
        erasure: Erasure,
        *,
        settings: Settings,
        sampler: SamplerConfig,  # noqa: ARG002 - the same for every sampler
        generator: torch.Generator,  # noqa: ARG002 - nothing is drawn
    ) -> Intervention:
        """Return the concepts' names as a negative prompt; see `Comparator.prepare`.

        Settings: `joined` (`list` = comma-separated, in as many lists as fit the text encoder; `single` = each name
        alone; features of several texts are averaged), `weight` of the features (1 = plain).
        """
        require_unet(backbone, name=self.name)
        self.space.check(settings, name=self.name)
        if not erasure.concepts:
            return Intervention()
        names = [concept.name for concept in erasure.concepts]
        texts = name_lists(backbone, names, joined=chosen(settings, "joined"))
        return Intervention(guiding=NegativePrompt(texts, number(settings, "weight")))
