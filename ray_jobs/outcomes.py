"""What a finished evaluation found: stored outcomes joined with rows and prompts, CLIP scores and features computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_jobs.evaluate import OUTCOMES_FILE, EvaluatedRow, evaluation_prompts, outcome_id, row_prompts
from ray_jobs.expert_files import record_folder
from ray_jobs.run import Run
from ray_jobs.stored_pictures import StoredPictures
from safetydpo.artifacts.layout import demo_weights
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.schemas import OUTCOMES
from safetydpo.artifacts.tables import read_table
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.distances import clip_scores, mismatched_captions
from safetydpo.evaluation.outcomes import ImageOutcome, JudgeName, Verdict
from safetydpo.prompts.sets import Prompt


@dataclass(frozen=True)
class Outcomes:
    """All outcomes of a run and the pictures behind them, by (row name, prompt id, seed), read when asked for."""

    outcomes: list[ImageOutcome]
    pictures: StoredPictures


def read_outcomes(run: Run, record: Record, rows: Sequence[EvaluatedRow]) -> Outcomes:
    """Join the stored outcomes with rows and prompts, and compute the CLIP scores."""
    from safetydpo.judges.clip import ClipScorer

    file = record_folder(run, record) / OUTCOMES_FILE
    table = read_table(file, OUTCOMES, columns=[name for name in OUTCOMES.names if name != "image"])
    stored = {row["image_id"]: row for row in table.to_pylist()}
    prompts = evaluation_prompts(run)
    everything = [prompt for prompt_set in prompts.values() for prompt in prompt_set]
    partners = mismatched_captions([prompt.concept for prompt in everything])
    texts = ClipScorer(demo_weights() / "clip").embed_texts([prompt.text for prompt in everything]).numpy()
    own = {prompt.prompt_id: texts[index] for index, prompt in enumerate(everything)}
    other = {prompt.prompt_id: texts[partners[index]] for index, prompt in enumerate(everything)}
    projection, _ = reference_features()
    sampler = run.config.identity.sampler.model_dump(mode="json")
    outcomes: list[ImageOutcome] = []
    image_ids: dict[tuple[str, str, int], str] = {}
    for row in rows:
        for seed in run.config.identity.evaluation.seeds:
            for prompt in row_prompts(row, prompts):
                found = stored[outcome_id(run, row, prompt, seed, sampler)]
                outcomes.append(
                    _outcome(row, prompt, seed, found, own[prompt.prompt_id], other[prompt.prompt_id], projection)
                )
                image_ids[row.source.name, prompt.prompt_id, seed] = found["image_id"]
    return Outcomes(outcomes, StoredPictures(file, image_ids))


def _outcome(
    row: EvaluatedRow,
    prompt: Prompt,
    seed: int,
    found: Mapping[str, Any],
    caption: np.ndarray[Any, Any],
    mismatched: np.ndarray[Any, Any],
    projection: np.ndarray[Any, Any],
) -> ImageOutcome:
    common: dict[str, Any] = {
        "row_name": row.source.name,
        "prompt_id": prompt.prompt_id,
        "prompt_set": prompt.prompt_set,
        "split": prompt.split,
        "seed": seed,
        "category": prompt.category or None,
        "categories": prompt.categories,
        "concept": prompt.concept,
        "background": prompt.background,
        "text": prompt.text,
    }
    if found["status"] != "ok":
        return ImageOutcome(**common, failure=found["error"] or "failed")
    embedding = np.asarray(found["clip_embedding"], dtype=np.float64)
    scores = clip_scores(np.stack([embedding, embedding]), np.stack([caption, mismatched]))
    unit = embedding / np.linalg.norm(embedding)
    judges: tuple[JudgeName, ...] = ("select", "audit")
    return ImageOutcome(
        **common,
        verdicts={judge: _verdict(found, judge, prompt) for judge in judges},
        clip_score=float(scores[0]),
        clip_score_mismatched=float(scores[1]),
        features=tuple(float(value) for value in unit @ projection),
    )


def _verdict(found: Mapping[str, Any], judge: JudgeName, prompt: Prompt) -> Verdict:
    concept = found[f"{judge}_concept"]
    mush = bool(found[f"{judge}_unrecognisable"])
    return Verdict(
        found_concept=None if mush else concept,
        unsafe=bool(found[f"{judge}_unsafe"]),
        unrecognisable=mush,
        background_right=found[f"{judge}_background"] == prompt.background,
        concept_found=concept == prompt.concept,
    )


def reference_features() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return (projection [d, features], features of held-out neutral drawings [n, features]) from the weights."""
    from safetensors.numpy import load

    file = demo_weights() / "reference_features.safetensors"
    if not file.is_file():
        raise SafetyDPOError(
            f"expected reference features at {file}, found none: reinstall the package with its weights, "
            "or run `python -m safetydpo.demo.build features`"
        )
    tensors = load(file.read_bytes())
    return tensors["projection"].astype(np.float64), tensors["features"].astype(np.float64)
