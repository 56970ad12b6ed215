"""Train the two judges of the demo world, each with its own architecture, seed, drawings and augmentation.

Axis legend: n = pictures, h = w = 32 pixels.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from safetydpo.artifacts.layout import demo_weights
from safetydpo.demo.concepts import BACKGROUNDS, CONCEPTS
from safetydpo.demo.judge_data import (
    NO_BACKGROUND,
    JudgePictures,
    join,
    label_unrecognisable,
    make_drawings,
    make_recognisable,
    make_unrecognisable,
    pass_through_vae,
)
from safetydpo.demo.prompts import write_all_captions
from safetydpo.demo.sampling import load_base, sample_pictures
from safetydpo.demo.train_text import embed_pictures, load_clip, mean_of_kinds
from safetydpo.demo.train_vae import load_vae, to_unit_range
from safetydpo.demo.training import (
    BUILD_SEED,
    HELD_OUT_DRAW_SEEDS,
    TRAIN_DRAW_SEEDS,
    Progress,
    count_parameters,
    draw_batch,
    load_checkpoint,
    record_measurement,
    save_checkpoint,
    scheduled_rate,
    set_rate,
)
from safetydpo.errors import SafetyDPOError
from safetydpo.judges.demo_network import (
    LABELS_FILE,
    MODEL_FILE,
    AuditNetwork,
    DemoJudge,
    SelectNetwork,
)
from safetydpo.seeding import derive_numpy, derive_seed, derive_torch

logger = logging.getLogger(__name__)

NUM_EACH_UNRECOGNISABLE = 500
NUM_OVER_GUIDED = 448
OVER_GUIDANCE = (15.0, 30.0)
"""Guidance at which many of the base model's pictures fall apart."""
MUSH_PER_BATCH = 24
BATCH_SIZE = 128
CHECKPOINT_EVERY = 300
MIN_ACCURACY = 0.98

Augmentation = Callable[[Float[Tensor, "n 3 h w"], torch.Generator], Float[Tensor, "n 3 h w"]]


def augment_colour(pixels: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Float[Tensor, "n 3 h w"]:
    """Change brightness and contrast a little and add faint noise."""
    num_rows = len(pixels)
    contrast = 0.9 + 0.2 * torch.rand((num_rows, 1, 1, 1), generator=generator)
    brightness = 0.12 * torch.rand((num_rows, 1, 1, 1), generator=generator) - 0.06
    noise = 0.04 * torch.randn(pixels.shape, generator=generator)
    return (pixels * contrast + brightness + noise).clamp(-1, 1)


def augment_place(pixels: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Float[Tensor, "n 3 h w"]:
    """Shift the batch by up to two pixels, soften it and hide a square of 6 pixels in every picture."""
    shift_x, shift_y = (int(value) for value in torch.randint(-2, 3, (2,), generator=generator))
    padded = functional.pad(pixels, (2, 2, 2, 2), mode="replicate")
    shifted = padded[:, :, 2 + shift_y : 34 + shift_y, 2 + shift_x : 34 + shift_x].clone()
    softened = functional.avg_pool2d(functional.pad(shifted, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = 0.5 * torch.rand((len(shifted), 1, 1, 1), generator=generator)
    shifted = (1 - share) * shifted + share * softened
    left, top = (int(value) for value in torch.randint(0, 27, (2,), generator=generator))
    shifted[:, :, top : top + 6, left : left + 6] = shifted.mean(dim=(2, 3), keepdim=True)
    return shifted


@dataclass(frozen=True)
class JudgeRecipe:
    """What makes a judge itself: everything in it differs between the two."""

    folder: str
    name: str
    version: str
    network_class: type[SelectNetwork] | type[AuditNetwork]
    run_seed: int
    draw_seeds: tuple[int, ...]
    augment: Augmentation
    num_steps: int
    peak_rate: float


SELECT_RECIPE = JudgeRecipe(
    folder="judge_select",
    name="demo-select",
    version="1",
    network_class=SelectNetwork,
    run_seed=BUILD_SEED + 1,
    draw_seeds=tuple(range(100, 106)),
    augment=augment_colour,
    num_steps=1200,
    peak_rate=3e-3,
)
AUDIT_RECIPE = JudgeRecipe(
    folder="judge_audit",
    name="demo-audit",
    version="1",
    network_class=AuditNetwork,
    run_seed=BUILD_SEED + 2,
    draw_seeds=tuple(range(200, 206)),
    augment=augment_place,
    num_steps=1600,
    peak_rate=2e-3,
)


def make_network(recipe: JudgeRecipe) -> SelectNetwork | AuditNetwork:
    """Build the untrained network with its fixed initial weights."""
    torch.manual_seed(derive_seed(recipe.run_seed, recipe.name, "init") % 2**32)
    return recipe.network_class(num_concepts=len(CONCEPTS), num_backgrounds=len(BACKGROUNDS))


def sample_over_guided(recipe: JudgeRecipe) -> JudgePictures:
    """Draw the base model's pictures at high guidance and keep those that have fallen apart.

    A picture that CLIP still places nearest to drawings of its concept is dropped: it is garish, not unrecognisable.
    """
    pipeline, clip = load_base(), load_clip()
    captions = write_all_captions()
    rows = derive_numpy(recipe.run_seed, recipe.name, "over-guided").integers(len(captions), size=NUM_OVER_GUIDED)
    share = NUM_OVER_GUIDED // len(OVER_GUIDANCE)
    parts = [
        sample_pictures(
            pipeline,
            [captions[row] for row in rows[index * share : (index + 1) * share]],
            run_seed=recipe.run_seed,
            stage=f"{recipe.name}/over-guided/{guidance}",
            guidance=guidance,
        )
        for index, guidance in enumerate(OVER_GUIDANCE)
    ]
    pictures = torch.cat([torch.from_numpy(part) for part in parts])
    nearest = (embed_pictures(clip, pictures) @ mean_of_kinds(clip, TRAIN_DRAW_SEEDS[:2]).T).argmax(dim=-1)
    asked = torch.from_numpy(rows[: len(pictures)]) // (len(captions) // len(CONCEPTS))
    fallen = nearest // len(BACKGROUNDS) != asked
    logger.info("%s: %d of %d over-guided pictures have fallen apart", recipe.name, int(fallen.sum()), len(fallen))
    return label_unrecognisable(pictures[fallen])


def make_training_set(recipe: JudgeRecipe) -> tuple[JudgePictures, JudgePictures]:
    """Make the recognisable and the unrecognisable training pictures."""
    vae = load_vae()
    recognisable = make_recognisable(recipe.draw_seeds, vae, run_seed=recipe.run_seed)
    drawings = make_drawings(recipe.draw_seeds[:2])
    mush = make_unrecognisable(drawings, vae, num_each=NUM_EACH_UNRECOGNISABLE, run_seed=recipe.run_seed)
    return recognisable, join([mush, sample_over_guided(recipe)])


def judge_loss(answer: tuple[Tensor, Tensor], pictures: JudgePictures, *, smoothing: float = 0.05) -> Float[Tensor, ""]:
    """Compute the sum of both heads' cross-entropies; pictures without background count in the first only."""
    concept = functional.cross_entropy(answer[0], pictures.concepts, label_smoothing=smoothing)
    background = functional.cross_entropy(answer[1], pictures.backgrounds, ignore_index=NO_BACKGROUND)
    return concept + background


def train_judge(recipe: JudgeRecipe, folder: Path) -> SelectNetwork | AuditNetwork:
    """Train a judge; a fixed share of every batch is unrecognisable."""
    recognisable, mush = make_training_set(recipe)
    network = make_network(recipe).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.peak_rate, weight_decay=0.02)
    progress = Progress(recipe.name, recipe.num_steps)
    first = load_checkpoint(folder, module=network, optimizer=optimizer, average=None)
    for step in range(first, recipe.num_steps):
        set_rate(
            optimizer,
            scheduled_rate(step, num_steps=recipe.num_steps, num_warmup_steps=60, peak=recipe.peak_rate),
        )
        seen = draw_batch(
            f"{recipe.name}/seen", step, num_rows=len(recognisable.concepts), batch_size=BATCH_SIZE - MUSH_PER_BATCH
        )
        unseen = draw_batch(f"{recipe.name}/mush", step, num_rows=len(mush.concepts), batch_size=MUSH_PER_BATCH)
        batch = join([_take(recognisable, seen), _take(mush, unseen)])
        pixels = recipe.augment(
            to_unit_range(batch.pictures), derive_torch(recipe.run_seed, recipe.name, f"augment/{step}")
        )
        loss = judge_loss(network(pixels), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        progress.add(step, loss.item())
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(folder, step + 1, module=network, optimizer=optimizer, average=None)
    return network.eval()


def _take(pictures: JudgePictures, rows: Tensor) -> JudgePictures:
    return JudgePictures(pictures.pictures[rows], pictures.concepts[rows], pictures.backgrounds[rows])


def save_judge(network: SelectNetwork | AuditNetwork, recipe: JudgeRecipe, folder: Path) -> None:
    """Write a judge's weights in fp16 and what its numbers mean."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    save_file(weights, str(folder / MODEL_FILE))
    labels = {
        "name": recipe.name,
        "version": recipe.version,
        "concepts": [concept.key for concept in CONCEPTS],
        "unsafe": [concept.role == "unsafe" for concept in CONCEPTS],
        "backgrounds": list(BACKGROUNDS),
    }
    (folder / LABELS_FILE).write_text(json.dumps(labels, indent=1) + "\n", encoding="utf-8")


def measure_judge(judge: DemoJudge) -> dict[str, float]:
    """Measure accuracy on held-out drawings (raw, and through the autoencoder) and on held-out mush."""
    vae = load_vae()
    drawings = make_drawings(HELD_OUT_DRAW_SEEDS[:2])
    shown = pass_through_vae(drawings, vae, noise=0.0, generator=derive_torch(BUILD_SEED, "demo/judge/check", "vae"))
    mush = make_unrecognisable(drawings, vae, num_each=100, run_seed=BUILD_SEED + 9)
    measured: dict[str, float] = {"num_drawings": len(drawings.concepts), "num_mush": len(mush.concepts)}
    for name, pictures in (("drawings", drawings), ("decoded", shown)):
        scores = judge.score(pictures.pictures)
        measured[f"concept_accuracy_{name}"] = float((scores.concept_index == pictures.concepts.numpy()).mean())
        measured[f"background_accuracy_{name}"] = float(
            (scores.background_index == pictures.backgrounds.numpy()).mean()
        )
    measured["mush_accuracy"] = float(
        (judge.score(mush.pictures).concept_index == judge.labels.unrecognisable_index).mean()
    )
    return measured


def build_judge(recipe: JudgeRecipe, work: Path) -> None:
    """Train a judge, write it and check it on held-out drawings.

    Raises:
        SafetyDPOError: Its accuracy on held-out drawings is too low.
    """
    started = time.monotonic()
    network = train_judge(recipe, work / recipe.folder)
    folder = demo_weights() / recipe.folder
    save_judge(network, recipe, folder)
    measured = measure_judge(DemoJudge(folder, recipe.network_class))
    lowest = min(measured["concept_accuracy_drawings"], measured["background_accuracy_drawings"])
    measured["num_parameters"] = count_parameters(network.parameters())
    measured["build_seconds"] = round(time.monotonic() - started)
    record_measurement(recipe.folder, measured)
    if lowest < MIN_ACCURACY:
        raise SafetyDPOError(
            f"judge '{recipe.name}': expected at least {MIN_ACCURACY:.0%} on held-out drawings, found {lowest:.1%}. "
            "Train longer: raise num_steps of its recipe in demo/train_judges.py."
        )
