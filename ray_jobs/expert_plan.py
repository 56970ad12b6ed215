"""Which experts a run trains: one unit of work each, with its pairs, its settings and its key."""

from __future__ import annotations

import functools
import logging
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.compute as pc

from ray_jobs.expert_watch import validation_inputs
from ray_jobs.prompt_tables import chosen_pairs
from ray_jobs.run import Run
from safetydpo.artifacts.records import ArtifactKey, Record
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, MEMBERSHIPS, PROMPT_PAIRS, SELECTIONS, sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows, read_table
from safetydpo.config.experts import ALL_SINGLE, ExpertsConfig
from safetydpo.config.pairs import GENERATE
from safetydpo.config.schema import IdentityConfig
from safetydpo.config.training import DpoConfig
from safetydpo.errors import SafetyDPOError
from safetydpo.pairs.groups import Grouping, Member, PairGroup, group_pairs, members_of

logger = logging.getLogger(__name__)
RECIPE_VERSION = 2
"""How pairs become an expert."""


@dataclass(frozen=True)
class ExpertUnit:
    """One expert to be trained: its name, its pairs, and the settings of its training.

    `other_pair_ids` are pairs of other experts whose pictures the retention term keeps as they are.
    """

    name: str
    pair_ids: tuple[str, ...]
    other_pair_ids: tuple[str, ...]
    categories: tuple[str, ...]
    dpo: DpoConfig
    key: ArtifactKey


def plan_experts(run: Run, pairs: Record, pairs_folder: Location) -> list[ExpertUnit]:
    """Return one unit per group of pairs, plus `all_single`; a pair in two groups trains both experts.

    Raises:
        UsageError: if a group asks for a value that no pair has, or two groups have one name.
        SafetyDPOError: if a group has too few pairs.
    """
    identity = run.config.identity
    kept = {
        row["pair_id"] for row in read_table(pairs_folder / "selections.parquet", SELECTIONS).to_pylist() if row["kept"]
    }
    members = [Member(**row) for row in read_table(pairs_folder / "memberships.parquet", MEMBERSHIPS).to_pylist()]
    texts = read_table(pairs_folder / "prompt_pairs.parquet", PROMPT_PAIRS, columns=["pair_id", "unsafe_text"])
    grouping = group_pairs(
        members,
        {row["pair_id"]: row["unsafe_text"] for row in texts.to_pylist()},
        kept=kept,
        categories=identity.prompts.categories,
        config=identity.experts,
    )
    _warn_of_left_out(grouping.left_out)
    everything = _everything(members, kept, identity)
    benign = benign_fingerprint(pairs, pairs_folder)
    units = [
        _unit(run, group, everything.pair_ids - group.pair_ids, identity.dpo, benign=benign)
        for group in grouping.groups
    ]
    if identity.experts.all_single:
        steps = max(1, round(identity.dpo.steps * identity.experts.all_single_step_factor))
        dpo = identity.dpo.model_copy(update={"steps": steps})
        units.append(_unit(run, everything, frozenset(), dpo, benign=benign))
    return units


def planned_names(identity: IdentityConfig) -> list[str]:
    """Return the names of a run's single experts before any pair is drawn: as if all chosen prompt pairs were kept.

    Raises:
        UsageError, SafetyDPOError: as `plan_experts`, for the prompt pairs.
    """
    if identity.experts.group_by == "category" and not identity.experts.groups:
        return list(identity.prompts.categories)
    return [group.name for group in group_prompt_pairs(identity).groups]


def refuse_left_out(row: str, rows: Container[str]) -> None:
    """Refuse to measure the row of an expert that was left out.

    Raises:
        SafetyDPOError: if it is none of `rows`.
    """
    if row.startswith("expert:") and row not in rows:
        raise SafetyDPOError(
            f"expected the row {row!r}, found no such expert: its group has too few kept pairs "
            "(identity.experts.small_groups=leave_out); take the concept out of the prompt set, or measure no single "
            "experts (identity.evaluation.expert_rows=false)"
        )


def group_prompt_pairs(identity: IdentityConfig) -> Grouping:
    """Return the groups of a run's prompt pairs, as if all of them were kept: what is wrong now stays wrong.

    Raises:
        UsageError, SafetyDPOError: as `plan_experts`, for the prompt pairs.
    """
    chosen = chosen_pairs(identity.prompts, seed=identity.seed)
    return group_pairs(
        members_of(chosen),
        {pair.pair_id: pair.unsafe_text for pair in chosen},
        kept={pair.pair_id for pair in chosen},
        categories=identity.prompts.categories,
        config=identity.experts,
    )


def is_grouped(experts: ExpertsConfig) -> bool:
    """Return whether experts are others than one per category."""
    return experts.group_by != "category" or bool(experts.groups)


@functools.lru_cache(maxsize=16)
def _warn_of_left_out(names: tuple[str, ...]) -> None:
    # Every stage plans the experts again; a person reads this once.
    if names:
        logger.warning(
            "no expert for %d groups with too few kept pairs (identity.experts.min_pairs): %s",
            len(names),
            ", ".join(names),
        )


def _everything(members: list[Member], kept: set[str], identity: IdentityConfig) -> PairGroup:
    categories = identity.prompts.categories
    ids = frozenset(row.pair_id for row in members if row.category in categories and row.pair_id in kept)
    return PairGroup(ALL_SINGLE, ids, categories)


def _unit(run: Run, group: PairGroup, other_pair_ids: frozenset[str], dpo: DpoConfig, *, benign: str) -> ExpertUnit:
    identity = run.config.identity
    others = other_pair_ids if dpo.retention_weight > 0 and dpo.retention_pictures != "neutral" else frozenset()
    key = ArtifactKey(
        stage="experts",
        name=group.name,
        identity={
            "name": group.name,
            "seed": identity.seed,
            "base": identity.base.model_dump(mode="json"),
            "sampler": identity.sampler.model_dump(mode="json"),
            "lora": identity.lora.model_dump(mode="json"),
            "dpo": dpo.model_dump(mode="json"),
        },
        inputs={
            "base": run.base_fingerprint,
            "pairs": fingerprint_rows((pair_id, "") for pair_id in group.pair_ids),
            # Benign pictures take part with the retention term only; without it they must not change a hash.
            "retention": benign if dpo.retention_weight > 0 else "",
            "retention_pairs": fingerprint_rows((pair_id, "") for pair_id in others) if others else "",
            **_safe_pictures(identity),
            **validation_inputs(identity, group.categories),
        },
        recipe_version=RECIPE_VERSION,
    )
    return ExpertUnit(group.name, tuple(sorted(group.pair_ids)), tuple(sorted(others)), group.categories, dpo, key)


def _safe_pictures(identity: IdentityConfig) -> dict[str, str]:
    """Return what a key says of how the safe pictures of its pairs were made; those drawn from noise need no word."""
    rules = identity.pairs
    if rules.safe_picture == "same_seed" or rules.source != GENERATE:
        return {}
    return {"safe_pictures": sha256_of([rules.safe_picture, rules.sdedit_strength, rules.sdedit_negative])}


def benign_fingerprint(pairs: Record, pairs_folder: Location) -> str:
    """Return what stands for the benign pictures in the key of a training: their prompts, without those that failed.

    A picture that failed when the pairs closed may be drawn by another run of the same store later; a training under
    the same key must not change by that, so it leaves the picture out for good. Failed pictures of pairs are no matter
    of this: their pair is not kept.
    """
    prompts = str(pairs.inputs["retention_prompts"])
    if not pairs.failed_units:
        return prompts
    manifest = read_table(pairs_folder / "images.parquet", IMAGE_MANIFEST, columns=["image_id", "side"])
    benign = manifest.filter(pc.equal(manifest.column("side"), "benign")).column("image_id").to_pylist()
    failed = sorted(set(benign) & set(pairs.failed_units))
    if not failed:
        return prompts
    return fingerprint_rows([(prompts, ""), *((image_id, "failed") for image_id in failed)])


def unit_to_json(unit: ExpertUnit) -> dict[str, Any]:
    """Return a unit as plain values, which is what a train function receives."""
    content = asdict(unit)
    content["dpo"] = unit.dpo.model_dump(mode="json")
    content["key"] = asdict(unit.key)
    return content


def unit_from_json(content: Mapping[str, Any]) -> ExpertUnit:
    """Return the unit of `unit_to_json`."""
    return ExpertUnit(
        name=content["name"],
        pair_ids=tuple(content["pair_ids"]),
        other_pair_ids=tuple(content["other_pair_ids"]),
        categories=tuple(content["categories"]),
        dpo=DpoConfig(**content["dpo"]),
        key=ArtifactKey(**content["key"]),
    )
