"""Safe latent guidance (SLD): a third branch sees the unsafe concepts, and guidance turns away from them."""

from __future__ import annotations

import torch

from safetydpo.baselines.conditions import name_lists
from safetydpo.baselines.intervention import Intervention, SafetyConcept
from safetydpo.baselines.protocol import Erasure, chosen, number, require_unet
from safetydpo.baselines.settings import Choice, Range, Settings, Space
from safetydpo.config.schema import SamplerConfig
from safetydpo.diffusion.backbone import Backbone


def _strength(scale: float, warmup_rate: float, threshold: float, momentum_scale: float, beta: float) -> Settings:
    return {
        "joined": "list",
        "scale": scale,
        "warmup_rate": warmup_rate,
        "threshold": threshold,
        "momentum_scale": momentum_scale,
        "momentum_beta": beta,
    }


class SldComparator:
    """SLD: `eps_0 + s_g (eps_p - eps_0 - gamma)`, equations 3 to 8 of the paper in `baselines.guidance`.

    Source: Schramowski et al. 2022 (arXiv 2211.05105).
    """

    name = "sld"
    paper = "Schramowski et al. 2022, Safe Latent Diffusion, arXiv 2211.05105"
    space = Space(
        settings={
            "joined": Choice(("list", "single")),
            "scale": Range(1.0, 5000.0, log=True),
            "warmup_rate": Range(0.0, 0.4),
            "threshold": Range(-0.1, 1.0),
            "momentum_scale": Range(0.0, 0.7),
            "momentum_beta": Range(0.0, 0.8),
        },
        # Hyp-Max, Hyp-Strong, Hyp-Medium and Hyp-Weak of the paper's table, warm-ups as shares of its 50 steps.
        first=(
            _strength(5000.0, 0.0, 1.0, 0.5, 0.7),
            _strength(2000.0, 0.14, 0.025, 0.5, 0.7),
            _strength(1000.0, 0.2, 0.01, 0.3, 0.4),
            _strength(200.0, 0.3, 0.0, 0.0, 0.0),
        ),
    )

    def prepare(
        self,
        backbone: Backbone,
        erasure: Erasure,
        *,
        settings: Settings,
        sampler: SamplerConfig,
        generator: torch.Generator,  # noqa: ARG002 - nothing is drawn
    ) -> Intervention:
        """Return the concepts' names as a safety concept; see `Comparator.prepare`.

        Settings: `joined` (as for the negative prompt), `scale` s_S, `warmup_rate` (share of the steps that are guided
        plainly, rounded), `threshold` lambda, `momentum_scale` s_m, `momentum_beta` beta_m.
        """
        require_unet(backbone, name=self.name)
        self.space.check(settings, name=self.name)
        if not erasure.concepts:
            return Intervention()
        names = [concept.name for concept in erasure.concepts]
        return Intervention(
            guiding=SafetyConcept(
                texts=name_lists(backbone, names, joined=chosen(settings, "joined")),
                scale=number(settings, "scale"),
                warmup_steps=round(number(settings, "warmup_rate") * sampler.steps),
                threshold=number(settings, "threshold"),
                momentum_scale=number(settings, "momentum_scale"),
                momentum_beta=number(settings, "momentum_beta"),
            )
        )
