"""Which of the pairs that were drawn are good: part of stage 1.

Judges and measures look at single pictures, each in a pool of its own; the rules of `safetydpo.pairs` then decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from ray_jobs.pair_workers import LayoutWorker, Measure
from ray_jobs.pools import Attachment, PoolStage, check_error_rate, fill_pool
from ray_jobs.workers import JudgeWorker
from safetydpo.artifacts.pool_index import FILE_COLUMN, read_rows
from safetydpo.artifacts.schemas import IMAGES, LAYOUTS, VERDICTS
from safetydpo.artifacts.storage import Location
from safetydpo.config.judges import JudgesConfig
from safetydpo.config.pairs import PairsConfig
from safetydpo.config.schema import ExecutionConfig, IdentityConfig, SamplerConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.build import (
    DEMO_SIDE,
    NO_LOCAL_WEIGHTS,
    clip_folder,
    fingerprint_files,
    fingerprint_judge,
    picture_side,
)
from safetydpo.pairs.layout import cosine_distance, pixel_distance
from safetydpo.pairs.select import (
    CAPPED,
    NO_VERDICT,
    Candidate,
    Distance,
    Selection,
    Verdict,
    combine_verdicts,
    pairs_over_cap,
    select_pair,
)
from safetydpo.prompts.sets import PromptPair

DERIVED_BATCH = 64
DERIVED_PASSES = 8
"""Judging or encoding a batch costs about as much as this many passes through the denoiser."""
PICTURE = pa.schema([IMAGES.field("image_id"), IMAGES.field("image")])
PICTURE_PLACE = ["image_id", FILE_COLUMN.name]
DISTANCES = {"pixels": pixel_distance, "embedding": cosine_distance}


@dataclass(frozen=True)
class PicturePools:
    """Where pictures lie, and the answers of each judge and measure on them."""

    pictures: Location
    verdicts: Mapping[str, Location]
    layouts: Mapping[Measure, Location]


@dataclass(frozen=True)
class Layouts:
    """What pictures are compared by: one row of numbers per picture, and whose it is.

    Python's floats would take ten times the memory, and there may be millions of rows.
    """

    values: Float[np.ndarray, "picture value"]
    places: Mapping[str, int]

    @classmethod
    def from_table(cls, table: pa.Table) -> Layouts:
        """Take the rows of a `layouts` table.

        Raises:
            SafetyDPOError: if not every row has equally many numbers.
        """
        column = table.column("values").combine_chunks()
        lengths = pc.unique(pc.list_value_length(column)).to_pylist()
        if len(lengths) > 1:
            raise SafetyDPOError(
                f"expected layouts of equally many numbers each, found rows of {lengths}: delete the pool of layouts "
                "and run the command again"
            )
        values = column.flatten().to_numpy().astype(np.float32, copy=False)
        places = {image_id: place for place, image_id in enumerate(table.column("image_id").to_pylist())}
        return cls(values.reshape(len(places), -1) if places else values.reshape(0, 0), places)

    def __contains__(self, image_id: str) -> bool:
        """Return whether a picture was measured."""
        return image_id in self.places

    def __getitem__(self, image_id: str) -> Float[np.ndarray, " value"]:
        """Return the numbers of a picture."""
        return self.values[self.places[image_id]]


@dataclass(frozen=True)
class Verified:
    """What becomes of each pair, by id; the settings that no judge could answer everywhere; what judges failed on."""

    selections: Mapping[str, Selection]
    not_judged: tuple[str, ...]
    failed: tuple[str, ...]
    """Pictures of pairs that a judge has no verdict on, after every attempt."""


def stored_pictures(pool: Location) -> Attachment:
    """Return what gives a worker the pictures of its rows."""
    return Attachment(pool, PICTURE, "image_id")


def layout_limits(rules: PairsConfig) -> dict[Measure, float]:
    """Return the measures of layout that are asked for, and how far apart pictures may be by each."""
    limits: dict[Measure, float | None] = {"pixels": rules.layout_pixel_max, "embedding": rules.layout_embedding_max}
    return {measure: limit for measure, limit in limits.items() if limit is not None}


def check_verification(identity: IdentityConfig, settings: JudgesConfig = NO_LOCAL_WEIGHTS) -> None:
    """Refuse judges, networks, pictures and latents that cannot be had, loading none of them.

    Raises:
        UsageError: naming the setting.
        SafetyDPOError: if weights are missing.
    """
    from safetydpo.diffusion.build import check_picture_size, embeds_guidance, resolve_files
    from safetydpo.diffusion.posterior import check_posterior

    rules, sampler = identity.pairs, identity.sampler
    fingerprint_judges(rules, settings)
    fingerprint_measures(rules)
    check_picture_sides(rules, sampler)
    check_picture_size(identity.base, height=sampler.height, width=sampler.width)
    away = rules.safe_picture == "sdedit" and rules.sdedit_negative == "unsafe_prompt"
    if away and embeds_guidance(identity.base):
        raise UsageError(
            "expected a model with an unguided branch for identity.pairs.sdedit_negative=unsafe_prompt, found "
            f"{identity.base.model!r}, which is told the guidance scale instead (FLUX.1 dev): set "
            "identity.pairs.sdedit_negative=empty"
        )
    if rules.latents == "mean_and_deviation":
        check_posterior(resolve_files(identity.base).folder_of("vae"))


def check_picture_sides(rules: PairsConfig, sampler: SamplerConfig) -> None:
    """Refuse judges and networks of the demo world for pictures of another size than its drawings have.

    Raises:
        UsageError: naming the setting.
    """
    sides = {f"judge {name!r} of identity.pairs.judges": picture_side(name) for name in rules.judges}
    if rules.layout_embedding_max is not None and rules.layout_clip == "demo":
        sides["identity.pairs.layout_clip 'demo'"] = DEMO_SIDE
    for user, side in sides.items():
        if side is not None and (sampler.height, sampler.width) != (side, side):
            raise UsageError(
                f"expected pictures of {side} x {side} (identity.sampler) for {user}, which knows the drawings of the "
                f"demo world only, found {sampler.height} x {sampler.width}: name one for real pictures, such as the "
                "judge open_nsfw or a folder with a CLIP model"
            )


def fingerprint_judges(rules: PairsConfig, settings: JudgesConfig = NO_LOCAL_WEIGHTS) -> str:
    """Return the fingerprint of all judges; that of a single judge is its own.

    Raises:
        UsageError: if there is no such judge, or its extra is not installed.
        SafetyDPOError: if its weights are missing.
    """
    try:
        found = [fingerprint_judge(name, settings) for name in rules.judges]
    except UsageError as error:
        raise UsageError(f"{error}: correct identity.pairs.judges") from error
    return found[0] if len(found) == 1 else "+".join(found)


def fingerprint_measures(rules: PairsConfig) -> dict[str, str]:
    """Return the fingerprints of networks that measure layouts; empty if none does.

    Raises:
        UsageError: if the CLIP model is no folder.
        SafetyDPOError: if its weights are missing.
    """
    if rules.layout_embedding_max is None:
        return {}
    return {"layout_clip": fingerprint_files(clip_folder(rules.layout_clip))}


def verify_pairs(
    pairs: Sequence[PromptPair],
    images: pa.Table,
    *,
    image_of: Mapping[tuple[str, str], str],
    rules: PairsConfig,
    pools: PicturePools,
    execution: ExecutionConfig,
) -> Verified:
    """Judge the good pictures of the index `images` (of pairs and benign ones); return what becomes of each pair.

    `image_of` gives the picture of (pair id, side); one that is not in `images` is missing.
    """
    of_pairs = {image_of[pair.pair_id, side] for pair in pairs for side in ("unsafe", "safe")}
    compared = pa.array([image_id in of_pairs for image_id in images.column("image_id").to_pylist()])
    verdicts, failed = _judge(images, rules=rules, pools=pools, execution=execution)
    layouts = _measure(images.filter(compared), rules=rules, pools=pools, execution=execution)
    selections = {}
    for pair in pairs:
        unsafe, safe = image_of[pair.pair_id, "unsafe"], image_of[pair.pair_id, "safe"]
        if not failed.isdisjoint((unsafe, safe)):
            selections[pair.pair_id] = Selection(False, NO_VERDICT)
            continue
        selections[pair.pair_id] = select_pair(
            verdicts.get(unsafe),
            verdicts.get(safe),
            unsafe_score_min=rules.unsafe_score_min,
            safe_score_max=rules.safe_score_max,
            unrecognisable_max=rules.unrecognisable_max,
            distances=_distances(layouts, unsafe, safe, rules=rules),
        )
    unknown = any(
        verdict.unrecognisable_score is None for image_id, verdict in verdicts.items() if image_id not in failed
    )
    return Verified(
        selections=_cap(pairs, selections, verdicts, image_of=image_of, rules=rules),
        not_judged=("unrecognisable_max",) if unknown else (),
        failed=tuple(sorted(failed & of_pairs)),
    )


def _judge(
    images: pa.Table, *, rules: PairsConfig, pools: PicturePools, execution: ExecutionConfig
) -> tuple[dict[str, Verdict], set[str]]:
    """Return every picture's verdict, of several judges the strictest, and the pictures that a judge failed on."""
    found: dict[str, Verdict] = {}
    failed: set[str] = set()
    for judge in rules.judges:
        stage = PoolStage(
            label="verdicts" if len(rules.judges) == 1 else f"verdicts of {judge}",
            output=VERDICTS,
            id_column="image_id",
            worker=JudgeWorker,
            arguments={
                "judge": judge,
                "batch_size": DERIVED_BATCH,
                "settings": execution.judges.model_dump(mode="json"),
            },
            batch_size=DERIVED_BATCH,
            passes_per_batch=DERIVED_PASSES,
            attach=stored_pictures(pools.pictures),
        )
        table = fill_pool(pools.verdicts[judge], images.select(PICTURE_PLACE), stage, execution=execution)
        failed |= set(check_error_rate(table, limit=rules.max_error_rate, what=stage.label))
        columns = (table.column(name).to_pylist() for name in ("image_id", "unsafe_score", "unrecognisable_score"))
        for image_id, unsafe, unrecognisable in zip(*columns, strict=True):
            verdict = Verdict(unsafe, unrecognisable)
            found[image_id] = combine_verdicts([found[image_id], verdict]) if image_id in found else verdict
    return found, failed


def _measure(
    images: pa.Table, *, rules: PairsConfig, pools: PicturePools, execution: ExecutionConfig
) -> dict[Measure, Layouts]:
    """Return what layouts are compared by, of each measure asked for."""
    found: dict[Measure, Layouts] = {}
    for measure in layout_limits(rules):
        stage = PoolStage(
            label=f"layouts ({measure})",
            output=LAYOUTS,
            id_column="image_id",
            worker=LayoutWorker,
            arguments={"measure": measure, "clip": rules.layout_clip, "batch_size": DERIVED_BATCH},
            batch_size=DERIVED_BATCH,
            passes_per_batch=DERIVED_PASSES,
            attach=stored_pictures(pools.pictures),
        )
        index = fill_pool(pools.layouts[measure], images.select(PICTURE_PLACE), stage, execution=execution)
        found[measure] = Layouts.from_table(read_rows(pools.layouts[measure], LAYOUTS, index, id_column="image_id"))
    return found


def _distances(layouts: Mapping[Measure, Layouts], unsafe: str, safe: str, *, rules: PairsConfig) -> list[Distance]:
    return [
        Distance(measure, DISTANCES[measure](layouts[measure][unsafe], layouts[measure][safe]), limit)
        for measure, limit in layout_limits(rules).items()
        if unsafe in layouts[measure] and safe in layouts[measure]
    ]


def _cap(
    pairs: Sequence[PromptPair],
    selections: Mapping[str, Selection],
    verdicts: Mapping[str, Verdict],
    *,
    image_of: Mapping[tuple[str, str], str],
    rules: PairsConfig,
) -> dict[str, Selection]:
    if rules.max_kept_per_concept is None:
        return dict(selections)
    # A pair that stands there under two concepts competes in the one whose name comes first; none ("") is no name.
    concepts = {pair.pair_id: "" for pair in pairs}
    concepts |= dict(sorted(((pair.pair_id, pair.concept) for pair in pairs if pair.concept), reverse=True))
    candidates = []
    for pair_id, concept in concepts.items():
        if selections[pair_id].kept:
            unsafe, safe = (verdicts[image_of[pair_id, side]].unsafe_score for side in ("unsafe", "safe"))
            candidates.append(Candidate(pair_id, concept, margin=unsafe - safe))
    over = pairs_over_cap(candidates, maximum=rules.max_kept_per_concept)
    return {pair_id: Selection(False, CAPPED) if pair_id in over else found for pair_id, found in selections.items()}
