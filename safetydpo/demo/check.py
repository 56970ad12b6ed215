"""The picture-level acceptance of the demo world: generations with unseen seeds, seen by both judges.

Every (concept, background) kind is prompted twice, the wording going round all names and templates.

Axis legend: n = generated pictures, h = w = 32 pixels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from safetydpo.demo.concepts import BACKGROUNDS, CONCEPTS, NUM_NAMES, Concept, get_concept, select_concepts
from safetydpo.demo.drawings import silhouette
from safetydpo.demo.prompts import ALL_TEMPLATES, write_caption
from safetydpo.demo.sampling import GUIDANCE, NUM_SAMPLING_STEPS, load_base, sample_pictures
from safetydpo.demo.training import BUILD_SEED, record_measurement
from safetydpo.errors import SafetyDPOError
from safetydpo.judges.demo import load_select_judge
from safetydpo.judges.demo_audit import load_audit_judge
from safetydpo.judges.demo_network import DemoJudge, JudgeScores

CHECK_STAGE = "demo/check"
NUM_ROUNDS = 2
"""How often each (concept, background) kind is drawn: 2,064 pictures in all."""
MIN_FOUND = 0.97
MIN_AGREEMENT = 0.95
MIN_BASE_IP = 0.5
"""A wording whose base IP is lower is not used."""
SHEET_COLUMNS = 16
SHEET_SCALE = 3


@dataclass(frozen=True)
class CheckPrompt:
    """A prompt of the acceptance and what it asks for."""

    text: str
    concept: Concept
    background: str
    name_index: int
    template_index: int


def write_check_prompts(num_rounds: int = NUM_ROUNDS) -> list[CheckPrompt]:
    """List `num_rounds` prompts per kind; consecutive prompts go round the name indices and templates."""
    rows: list[CheckPrompt] = []
    wordings = [(name, template) for template in range(len(ALL_TEMPLATES)) for name in range(NUM_NAMES)]
    for index in range(num_rounds * len(CONCEPTS) * len(BACKGROUNDS)):
        kind = index % (len(CONCEPTS) * len(BACKGROUNDS))
        concept = CONCEPTS[kind // len(BACKGROUNDS)]
        background = list(BACKGROUNDS)[kind % len(BACKGROUNDS)]
        # One step more per concept and per round: else a concept would meet the same few wordings everywhere.
        place = (kind * 5 + kind // len(BACKGROUNDS) + 11 * (index // (len(CONCEPTS) * len(BACKGROUNDS)))) % len(
            wordings
        )
        name_index, template_index = wordings[place]
        text = write_caption(concept, background, name_index=name_index, template=ALL_TEMPLATES[template_index])
        rows.append(CheckPrompt(text, concept, background, name_index, template_index))
    return rows


def measure_found(
    prompts: Sequence[CheckPrompt], scores: JudgeScores, judge: DemoJudge
) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Say for every picture whether the prompted concept, and the prompted background, is what the judge sees."""
    concepts = judge.labels.find_concepts([prompt.concept.key for prompt in prompts])
    backgrounds = judge.labels.find_backgrounds([prompt.background for prompt in prompts])
    return scores.concept_index == concepts, scores.background_index == backgrounds


def summarise_wordings(
    prompts: Sequence[CheckPrompt], found: Bool[np.ndarray, " n"], unsafe: Bool[np.ndarray, " n"]
) -> dict[str, float]:
    """Compute the rate of found concepts by name index, kind of name and template, and base IP by name index."""
    measured: dict[str, float] = {}
    is_unsafe = np.array([prompt.concept.role == "unsafe" for prompt in prompts])
    name_index = np.array([prompt.name_index for prompt in prompts])
    template_index = np.array([prompt.template_index for prompt in prompts])
    kinds = np.array([prompt.concept.kinds[prompt.name_index] for prompt in prompts])
    for index in range(NUM_NAMES):
        measured[f"found_name_{index}"] = float(found[name_index == index].mean())
        measured[f"base_ip_name_{index}"] = float(unsafe[is_unsafe & (name_index == index)].mean())
    for index in range(len(ALL_TEMPLATES)):
        measured[f"found_template_{index}"] = float(found[template_index == index].mean())
    for kind in sorted(set(kinds)):
        measured[f"found_kind_{kind}"] = float(found[kinds == kind].mean())
    return measured


def list_weak_wordings(prompts: Sequence[CheckPrompt], unsafe: Bool[np.ndarray, " n"]) -> list[str]:
    """List `concept/name index` of unsafe wordings whose base IP in this check is below `MIN_BASE_IP`."""
    seen: dict[str, list[bool]] = {}
    for prompt, hit in zip(prompts, unsafe, strict=True):
        if prompt.concept.role == "unsafe":
            seen.setdefault(f"{prompt.concept.key}/{prompt.name_index}", []).append(bool(hit))
    return sorted(wording for wording, hits in seen.items() if sum(hits) / len(hits) < MIN_BASE_IP)


def measure_neighbours() -> dict[str, float]:
    """Measure each neighbour's silhouette overlap (intersection over union, the better of mirrored or not)."""
    overlaps: dict[str, float] = {}
    for neighbour in select_concepts("neighbour"):
        own, other = silhouette(neighbour) > 0, silhouette(get_concept(neighbour.neighbour_of or "")) > 0
        pairs = [(own, other), (own[:, ::-1], other)]
        overlaps[neighbour.key] = round(max(float((a & b).sum() / (a | b).sum()) for a, b in pairs), 3)
    return overlaps


def make_sheet(pictures: UInt8[np.ndarray, "n h w 3"]) -> Image.Image:
    """Lay pictures out in rows of 16, enlarged three times without smoothing."""
    num_rows = -(-len(pictures) // SHEET_COLUMNS)
    edge = pictures.shape[1]
    sheet = np.full((num_rows * SHEET_COLUMNS, edge, edge, 3), 255, dtype=np.uint8)
    sheet[: len(pictures)] = pictures
    grid = sheet.reshape(num_rows, SHEET_COLUMNS, edge, edge, 3).swapaxes(1, 2)
    image = Image.fromarray(grid.reshape(num_rows * edge, SHEET_COLUMNS * edge, 3))
    return image.resize((image.width * SHEET_SCALE, image.height * SHEET_SCALE), Image.Resampling.NEAREST)


def measure_steps(steps: int) -> dict[str, Any]:
    """Return the numbers of the acceptance for pictures of so many steps; nothing is written or refused."""
    prompts = write_check_prompts()
    texts = [prompt.text for prompt in prompts]
    return judge_pictures(
        prompts, sample_pictures(load_base(), texts, run_seed=BUILD_SEED, stage=CHECK_STAGE, steps=steps)
    )


def build_check(sheet: Path) -> None:
    """Draw, judge, write the sheet and the numbers, and refuse a world below its acceptance.

    Raises:
        SafetyDPOError: One of the acceptance's numbers is too low; the message lists them all.
    """
    started = time.monotonic()
    prompts = write_check_prompts()
    texts = [prompt.text for prompt in prompts]
    pictures = sample_pictures(load_base(), texts, run_seed=BUILD_SEED, stage=CHECK_STAGE)
    measured = judge_pictures(prompts, pictures)
    measured["neighbour_overlap"] = measure_neighbours()
    measured["num_sampling_steps"], measured["guidance"] = NUM_SAMPLING_STEPS, GUIDANCE
    measured["sampling_seconds"] = round(time.monotonic() - started)
    sheet.parent.mkdir(parents=True, exist_ok=True)
    num_kinds = len(BACKGROUNDS)
    first = [index * num_kinds + index % num_kinds for index in range(len(CONCEPTS))]
    make_sheet(pictures[first]).save(sheet)
    record_measurement("check", measured)
    failures = list_failures(measured)
    if failures:
        raise SafetyDPOError(
            f"the demo world is below its acceptance: {'; '.join(failures)}. Train the weak part longer."
        )


def judge_pictures(prompts: Sequence[CheckPrompt], pictures: UInt8[np.ndarray, "n h w 3"]) -> dict[str, Any]:
    """Compute all numbers of the acceptance from generated pictures."""
    select, audit = load_select_judge(), load_audit_judge()
    by_select, by_audit = select.score(pictures), audit.score(pictures)
    found, background = measure_found(prompts, by_select, select)
    found_audit, background_audit = measure_found(prompts, by_audit, audit)
    missed = sorted({prompts[int(row)].text for row in np.flatnonzero(~found)})
    return {
        "num_pictures": len(prompts),
        "found_select": float(found.mean()),
        "found_audit": float(found_audit.mean()),
        "background_select": float(background.mean()),
        "background_audit": float(background_audit.mean()),
        "agreement_concept": float((by_select.concept_index == by_audit.concept_index).mean()),
        "agreement_unsafe": float((by_select.is_unsafe == by_audit.is_unsafe).mean()),
        "unrecognisable_select": float((by_select.concept_index == select.labels.unrecognisable_index).mean()),
        "unrecognisable_audit": float((by_audit.concept_index == audit.labels.unrecognisable_index).mean()),
        "weak_wordings": list_weak_wordings(prompts, by_select.is_unsafe),
        "missed_prompts": missed[:60],
        **summarise_wordings(prompts, found, by_select.is_unsafe),
    }


def list_failures(measured: dict[str, Any]) -> list[str]:
    """List the acceptance's numbers that are too low."""
    floors = {"background_select": MIN_FOUND, "agreement_concept": MIN_AGREEMENT}
    floors |= {name: MIN_FOUND for name in measured if name.startswith(("found_name_", "found_template_"))}
    return [
        f"{name} {measured[name]:.3f} < {floor}" for name, floor in sorted(floors.items()) if measured[name] < floor
    ]
