"""Erased Stable Diffusion (ESD): a fine-tune whose target is the frozen base's own guidance, turned round.

Axis legend: `row` training points, `channel height width` latent axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from safetydpo.artifacts.adapters import LoraSignature
from safetydpo.baselines.guidance import erasing_target
from safetydpo.baselines.intervention import Intervention
from safetydpo.baselines.protocol import Erasure, chosen, number, require_unet
from safetydpo.baselines.settings import Choice, Range, Settings, Space
from safetydpo.config.schema import SamplerConfig
from safetydpo.diffusion.adapter import initial_adapter, linear_layers
from safetydpo.diffusion.backbone import Backbone, Condition, GuidanceStep
from safetydpo.errors import SafetyDPOError

CROSS_ATTENTION = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
TIME_LAYERS = ("time_embedding.", "add_embedding.")
START_GUIDANCE = 3.0
"""Guidance with which the training points are sampled, as in the authors' code."""
TRAJECTORIES_LAST = 8
"""Optimizer steps after which new trajectories are drawn with the network as it is by then. The paper draws one point
of one trajectory per step; a whole trajectory costs little more and gives as many points as it has steps."""


def _training(layers: str) -> Settings:
    # The paper: eta 1, 1,000 steps of one row at 1e-5 on all weights of the layers. A low-rank change needs a higher
    # rate, and a small model fewer steps.
    return {
        "layers": layers,
        "negative_guidance": 1.0,
        "learning_rate": 3e-3,
        "steps": 60,
        "rows_per_step": 8,
        "rank": 16,
    }


class EsdComparator:
    """ESD: `eps_theta(x_t, c) <- eps_0(x_t) - eta (eps_0(x_t, c) - eps_0(x_t))`, targets from the frozen base.

    Source: Gandikota et al. 2023 (arXiv 2303.07345), equations 7 and 8; ESD-x and ESD-u of section 4.1.
    """

    name = "esd"
    paper = "Gandikota et al. 2023, Erasing Concepts from Diffusion Models, arXiv 2303.07345"
    space = Space(
        settings={
            "layers": Choice(("x", "u")),
            "negative_guidance": Range(0.0, 10.0),
            "learning_rate": Range(1e-6, 1e-1, log=True),
            "steps": Range(1, 10000, whole=True),
            "rows_per_step": Range(1, 1024, whole=True),
            "rank": Range(1, 1024, whole=True),
        },
        first=(_training("x"), _training("u")),
        # A training of the same length each, so that a candidate costs the same.
        drawn={
            "layers": Choice(("x", "u")),
            "negative_guidance": Range(0.5, 3.0),
            "learning_rate": Range(1e-3, 3e-2, log=True),
        },
    )

    def prepare(
        self,
        backbone: Backbone,
        erasure: Erasure,
        *,
        settings: Settings,
        sampler: SamplerConfig,
        generator: torch.Generator,
    ) -> Intervention:
        """Train the low-rank change of the chosen layers; see `Comparator.prepare`.

        Settings: `layers` (`x` = cross-attention, `u` = all other linear layers but the embedding of the timestep),
        `negative_guidance` eta, `learning_rate` of Adam, `steps`, `rows_per_step`, `rank`.

        Raises:
            SafetyDPOError: if the loss is not finite.
        """
        require_unet(backbone, name=self.name)
        self.space.check(settings, name=self.name)
        if not erasure.concepts:
            return Intervention()
        targets = trained_layers(backbone, chosen(settings, "layers"))
        rank = int(number(settings, "rank"))
        signature = LoraSignature(rank, float(rank), targets)
        start = initial_adapter(
            backbone.named_linear_layers(targets),
            signature,
            base_fingerprint=backbone.fingerprint,
            run_seed=int(torch.randint(2**31, (1,), generator=generator)),
            init="independent",
            expert_name=self.name,
        )
        backbone.swap_adapter(signature, start)
        try:
            _train(backbone, erasure, settings=settings, sampler=sampler, generator=generator)
            layers = backbone.export_adapter()
        finally:
            backbone.remove_adapter()
        return Intervention(layers)


def trained_layers(backbone: Backbone, which: str) -> tuple[str, ...]:
    """Return the names of the layers of ESD-x or ESD-u, sorted."""
    names = [name for name, _ in backbone.named_linear_layers(CROSS_ATTENTION)]
    if which == "u":
        names = [name for name in set(linear_layers(backbone.network)) - set(names) if not _is_of_time(name)]
    return tuple(sorted(names))


def _is_of_time(name: str) -> bool:
    return name.startswith(TIME_LAYERS)


@dataclass(frozen=True)
class TrainingPoints:
    """Noisy latents on the way to pictures of the concepts."""

    latents: Float[Tensor, "row channel height width"]
    timesteps: Real[Tensor, " row"]
    prompts: Int[Tensor, " row"]
    """Which prompt each is drawn under."""


def draw_points(
    backbone: Backbone, prompts: Sequence[str], *, sampler: SamplerConfig, num_pictures: int, generator: torch.Generator
) -> TrainingPoints:
    """Sample pictures of random prompts with the network as it is; return the latents before each step."""
    picked = torch.randint(len(prompts), (num_pictures,), generator=generator)
    shape = backbone.latent_shape(height=sampler.height, width=sampler.width)
    noise = torch.randn((num_pictures, *shape), generator=generator)
    seen: list[tuple[Tensor, float]] = []

    def keep(step: GuidanceStep) -> Tensor:
        seen.append((step.latents, step.timestep))
        return step.combined

    backbone.sample(
        noise,
        backbone.encode_prompts([prompts[int(index)] for index in picked]),
        empty=backbone.encode_prompts([""]),
        steps=sampler.steps,
        guidance_scale=START_GUIDANCE,
        callback=keep,
    )
    return TrainingPoints(
        torch.cat([latents for latents, _ in seen]),
        torch.tensor([time for _, time in seen]).repeat_interleave(num_pictures),
        picked.repeat(len(seen)),
    )


def _train(
    backbone: Backbone, erasure: Erasure, *, settings: Settings, sampler: SamplerConfig, generator: torch.Generator
) -> None:
    prompts = [text for concept in erasure.concepts for text in concept.prompts]
    steps, rows = int(number(settings, "steps")), int(number(settings, "rows_per_step"))
    parameters = [parameter for _, parameter in backbone.adapter_parameters()]
    optimizer = torch.optim.Adam(parameters, lr=number(settings, "learning_rate"))
    batches = _batches(backbone, prompts, sampler=sampler, rows=rows, steps=steps, generator=generator)
    for step, (latents, timesteps, condition) in enumerate(batches):
        empty = backbone.encode_prompts([""]).expand(len(latents))
        with torch.no_grad(), backbone.adapter_off():
            both = empty.followed_by(condition)
            answered = backbone.predict(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), both).float()
        wanted = erasing_target(*answered.chunk(2), negative_guidance=number(settings, "negative_guidance"))
        loss = (backbone.predict(latents, timesteps, condition).float() - wanted).square().mean()
        if not math.isfinite(value := float(loss.detach())):
            raise SafetyDPOError(
                f"expected a finite loss of ESD, found {value} in step {step}: lower its learning_rate"
            )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()


def _batches(
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    sampler: SamplerConfig,
    rows: int,
    steps: int,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor, Condition]]:
    """Yield (latents, timesteps, condition of their prompts) for each step."""
    points = None
    for step in range(steps):
        if points is None or step % TRAJECTORIES_LAST == 0:
            points = draw_points(backbone, prompts, sampler=sampler, num_pictures=rows, generator=generator)
        picked = torch.randint(len(points.timesteps), (rows,), generator=generator)
        texts = [prompts[int(index)] for index in points.prompts[picked]]
        latents, timesteps = points.latents[picked.to(points.latents.device)], points.timesteps[picked]
        # Whole numbers, as training draws them; U-Nets have no others.
        yield latents, timesteps.long().to(latents.device), backbone.encode_prompts(texts)
