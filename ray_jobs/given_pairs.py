"""Stage 1 without drawing: preferences that were imported, encoded by this run's model at this run's size.

Nothing is judged: the labels of the files are the judgement. Benign pictures of the retention term are drawn as always.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.cluster import connect
from ray_jobs.generate_pairs import draw_pictures, encode_captions, encode_pictures, latent_batch_size, latent_pool
from ray_jobs.places import PAIRS_RECIPE_VERSION
from ray_jobs.pools import PoolStage, check_error_rate, fill_pool
from ray_jobs.prompt_tables import retention_prompts
from ray_jobs.run import Run
from ray_jobs.verify_pairs import DERIVED_BATCH, DERIVED_PASSES, PICTURE_PLACE, stored_pictures
from ray_jobs.workers import LatentWorker
from safetydpo.artifacts.layout import MEMBERSHIPS_FILE, PROMPT_PAIRS_FILE
from safetydpo.artifacts.pool_index import read_index
from safetydpo.artifacts.records import ArtifactKey, Record
from safetydpo.artifacts.schemas import (
    IMAGE_MANIFEST,
    IMAGES,
    LATENTS,
    MEMBERSHIPS,
    PER_CONCEPT,
    PROMPT_PAIRS,
    SELECTIONS,
)
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import fingerprint_rows, read_table, table_from_rows, table_from_stream, write_table
from safetydpo.config.schema import IdentityConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.pairs.concepts import count_reasons
from safetydpo.pairs.groups import Member, group_pairs
from safetydpo.pairs.manifest import retention_image_rows
from safetydpo.pairs.preference_store import IMAGES_FILE, open_preferences, picture_pool
from safetydpo.pairs.select import KEPT, check_enough_pairs
from safetydpo.prompts.sets import Prompt


def take_given_pairs(run: Run) -> Record:
    """Make or find the pairs artifact of a run whose preferences were imported.

    Raises:
        UsageError, SafetyDPOError: if the folder is no finished import, or has too few rows of a category.
    """
    identity = run.config.identity
    place = open_location(identity.pairs.source)
    given = open_preferences(place)
    benign = retention_prompts(identity.prompts, seed=identity.seed)
    key = given_key(run, given, [prompt.prompt_id for prompt in benign])
    return run.build("pairs", key, lambda folder: _make(run, folder, place, given, benign))


def check_given(identity: IdentityConfig) -> None:
    """Refuse imported preferences that cannot be what a run asks for, loading no network.

    Raises:
        UsageError, SafetyDPOError: as `take_given_pairs` and, for groups of pairs, as `plan_experts`.
    """
    from safetydpo.diffusion.build import check_picture_size, resolve_files
    from safetydpo.diffusion.posterior import check_posterior

    place = open_location(identity.pairs.source)
    given = open_preferences(place)
    if identity.dpo.redirection_weight > 0 and given.counts["one_caption"]:
        raise UsageError(
            "expected rows with an unsafe and a safe caption for identity.dpo.redirection_weight "
            f"({identity.dpo.redirection_weight}), found {given.counts['one_caption']} with one in {place}: set it to "
            "0, or import files with a column safe_prompt"
        )
    check_picture_size(identity.base, height=identity.sampler.height, width=identity.sampler.width)
    if identity.pairs.latents == "mean_and_deviation":
        check_posterior(resolve_files(identity.base).folder_of("vae"))
    texts = read_table(place / PROMPT_PAIRS_FILE, PROMPT_PAIRS, columns=["pair_id", "unsafe_text"]).to_pylist()
    members = read_table(place / MEMBERSHIPS_FILE, MEMBERSHIPS)
    chosen = _taking_part(members, identity)
    _count(chosen, identity)
    group_pairs(
        [Member(**row) for row in chosen.to_pylist()],
        {row["pair_id"]: row["unsafe_text"] for row in texts},
        kept=set(chosen.column("pair_id").to_pylist()),
        categories=identity.prompts.categories,
        config=identity.experts,
    )


def given_key(run: Run, given: Record, benign: list[str]) -> ArtifactKey:
    """Return the key of the pairs artifact of imported preferences and benign prompts (ids)."""
    identity = run.config.identity
    settings = identity.pairs.model_dump(mode="json")
    # What the folder holds counts, not where it stands.
    del settings["source"]
    return ArtifactKey(
        stage="pairs",
        name=run.config.name,
        identity={
            "seed": identity.seed,
            "base": identity.base.model_dump(mode="json"),
            "sampler": identity.sampler.model_dump(mode="json"),
            "pairs": settings,
            "categories": list(identity.prompts.categories),
        },
        inputs={
            "base": run.base_fingerprint,
            "preferences": given.fingerprint,
            "retention_prompts": fingerprint_rows((prompt_id, "") for prompt_id in benign),
        },
        recipe_version=PAIRS_RECIPE_VERSION,
    )


def _make(run: Run, folder: Location, place: Location, given: Record, benign: list[Prompt]) -> Mapping[str, Any]:
    connect(run.config)
    identity = run.config.identity
    members = _taking_part(read_table(place / MEMBERSHIPS_FILE, MEMBERSHIPS), identity)
    counts = _count(members, identity)
    ids = pc.unique(members.column("pair_id").combine_chunks()).sort()
    manifest = _rows_of(read_table(place / IMAGES_FILE, IMAGE_MANIFEST), "owner_id", ids)
    drawn = _benign_manifest(run, benign)
    write_table(folder / IMAGES_FILE, pa.concat_tables([manifest, drawn]))
    write_table(folder / MEMBERSHIPS_FILE, members)
    write_table(
        folder / PROMPT_PAIRS_FILE, _rows_of(read_table(place / PROMPT_PAIRS_FILE, PROMPT_PAIRS), "pair_id", ids)
    )
    chosen = [{"pair_id": pair_id, "seed": 0, "kept": True, "reason": KEPT} for pair_id in ids.to_pylist()]
    write_table(folder / "selections.parquet", table_from_rows(chosen, SELECTIONS))
    _write_concepts(folder, members)
    _encode_given(run, manifest, picture_pool(place))
    failed: list[str] = []
    if drawn.num_rows:
        images = draw_pictures(run, drawn)
        failed = check_error_rate(images, limit=identity.pairs.max_error_rate)
        encode_pictures(run, images.filter(pc.equal(images.column("status"), "ok")), drawn)
    encode_captions(run, pa.concat_tables([manifest, drawn]))
    pictures = len(pc.unique(manifest.column("image_id")))
    return {
        "fingerprint": fingerprint_rows([(given.fingerprint, ""), *((pair_id, "True") for pair_id in ids.to_pylist())]),
        "counts": {"pairs": len(ids), "kept": len(ids), "pictures": pictures + drawn.num_rows, **counts},
        "failed_units": failed,
        "details": {
            "reasons": {KEPT: len(ids)},
            "concepts_below_minimum": {},
            "not_judged": [],
            "given": {"folder": str(place), "base": given.details["base"], "fingerprint": given.fingerprint},
        },
    }


def _taking_part(members: pa.Table, identity: IdentityConfig) -> pa.Table:
    """Return all memberships of the pairs that have one of the run's categories."""
    wanted = pa.array(list(identity.prompts.categories), type=pa.string())
    ids = members.filter(pc.is_in(members.column("category"), value_set=wanted)).column("pair_id").combine_chunks()
    return _rows_of(members, "pair_id", pc.unique(ids))


def _rows_of(table: pa.Table, column: str, ids: pa.Array) -> pa.Table:
    return table.filter(pc.is_in(table.column(column), value_set=ids))


def _count(members: pa.Table, identity: IdentityConfig) -> Mapping[str, int]:
    found: dict[str, list[str]] = {}
    for row in members.to_pylist():
        found.setdefault(row["pair_id"], []).append(row["category"])
    rules = identity.pairs
    try:
        return check_enough_pairs(
            [tuple(dict.fromkeys(names)) for names in found.values()],
            categories=identity.prompts.categories,
            minimum=rules.min_kept_per_category,
        )
    except SafetyDPOError as error:
        raise SafetyDPOError(f"{error} (they were imported: {rules.source})") from error


def _write_concepts(folder: Location, members: pa.Table) -> None:
    rows = members.select(["pair_id", "concept"]).to_pylist()
    counted = count_reasons(((row["pair_id"], row["concept"]) for row in rows), {row["pair_id"]: KEPT for row in rows})
    table = [{"concept": concept, "reason": KEPT, "pairs": found[KEPT]} for concept, found in counted.items()]
    write_table(folder / "per_concept.parquet", table_from_rows(table, PER_CONCEPT))


def _benign_manifest(run: Run, benign: list[Prompt]) -> pa.Table:
    identity = run.config.identity
    sampler = identity.sampler.model_dump(mode="json")
    common: dict[str, Any] = {"base_fingerprint": run.base_fingerprint, "sampler": sampler}
    return table_from_stream(retention_image_rows(benign, run_seed=identity.seed, **common), IMAGE_MANIFEST)


def _encode_given(run: Run, manifest: pa.Table, pictures: Location) -> None:
    identity = run.config.identity
    sampler = identity.sampler
    stage = PoolStage(
        label="latents",
        output=LATENTS,
        id_column="image_id",
        worker=GivenLatentWorker,
        arguments={
            "base": identity.base.model_dump(),
            "batch_size": latent_batch_size(sampler),
            "with_deviation": identity.pairs.latents == "mean_and_deviation",
            "height": sampler.height,
            "width": sampler.width,
        },
        batch_size=DERIVED_BATCH,
        passes_per_batch=DERIVED_PASSES,
        attach=stored_pictures(pictures),
        inputs={"base": run.base_fingerprint},
    )
    wanted = pc.unique(manifest.column("image_id").combine_chunks())
    index = read_index(pictures, IMAGES, wanted=wanted, id_column="image_id")
    fill_pool(latent_pool(run), index.select(PICTURE_PLACE), stage, execution=run.config.execution)


class GivenLatentWorker(LatentWorker):
    """Encodes pictures of any size, each fitted to this run's."""

    def __init__(
        self, base: Mapping[str, Any], batch_size: int, *, with_deviation: bool, height: int, width: int
    ) -> None:
        super().__init__(base, batch_size, with_deviation)
        self._size = {"height": height, "width": width}

    def _decode(self, images: list[bytes]) -> Any:
        import numpy as np
        import torch

        from safetydpo.diffusion.given_pictures import fit_picture

        return torch.from_numpy(np.stack([fit_picture(data, **self._size) for data in images]))
