"""Which experts a run trains: one unit of work each, with its pairs, its settings and its key."""

from __future__ import annotations

import functools
import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from ray_jobs.expert_watch import validation_inputs
from ray_jobs.prompt_tables import chosen_pairs
from ray_jobs.run import Run
from safetydpo.artifacts.records import ArtifactKey, Record
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, MEMBERSHIPS, PROMPT_PAIRS, SELECTIONS, sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows, fingerprint_sorted_ids, read_table
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
class OtherPairs:
    """All pairs of a run but some; listed only when asked for, since each of many experts lacks only a few of them."""

    everything: tuple[str, ...] = ()
    """In order, and one tuple for all experts: to sort it anew for each of 500 takes minutes."""
    own: frozenset[str] = frozenset()

    def ids(self) -> tuple[str, ...]:
        """Return their ids in order."""
        return tuple(pair_id for pair_id in self.everything if pair_id not in self.own)


@dataclass(frozen=True)
class ExpertUnit:
    """One expert to be trained: its name, its pairs, and the settings of its training."""

    name: str
    group: str
    """Name of its group of pairs; that of the expert."""
    pair_ids: tuple[str, ...]
    others: OtherPairs
    """Pairs of other experts whose pictures the retention term keeps as they are."""
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
    grouping, everything = _group_kept(identity, pairs_folder)
    _warn_of_left_out(grouping.left_out)
    benign = benign_fingerprint(pairs, pairs_folder)
    ordered = tuple(sorted(everything.pair_ids))
    units = [
        _unit(run, group, _others(identity.dpo, group, ordered), identity.dpo, benign=benign)
        for group in grouping.groups
    ]
    if identity.experts.all_single:
        steps = max(1, round(identity.dpo.steps * identity.experts.all_single_step_factor))
        dpo = identity.dpo.model_copy(update={"steps": steps})
        units.append(_unit(run, everything, OtherPairs(), dpo, benign=benign))
    return units


def _group_kept(identity: IdentityConfig, pairs_folder: Location) -> tuple[Grouping, PairGroup]:
    """Return the groups of a pairs artifact's kept pairs, and the group of all of them."""
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
    return grouping, _everything(members, kept, identity)


def _others(dpo: DpoConfig, group: PairGroup, everything: tuple[str, ...]) -> OtherPairs:
    is_used = dpo.retention_weight > 0 and dpo.retention_pictures != "neutral" and group.name != ALL_SINGLE
    return OtherPairs(everything, group.pair_ids) if is_used else OtherPairs()


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


def _unit(run: Run, group: PairGroup, others: OtherPairs, dpo: DpoConfig, *, benign: str) -> ExpertUnit:
    identity, other_ids = run.config.identity, others.ids()
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
            "pairs": _fingerprint(group.pair_ids),
            # Benign pictures take part with the retention term only; without it they must not change a hash.
            "retention": benign if dpo.retention_weight > 0 else "",
            "retention_pairs": fingerprint_sorted_ids(other_ids) if other_ids else "",
            **_safe_pictures(identity),
            **validation_inputs(identity, group.categories, run.config.execution.judges),
        },
        recipe_version=RECIPE_VERSION,
    )
    return ExpertUnit(group.name, group.name, tuple(sorted(group.pair_ids)), others, group.categories, dpo, key)


def _fingerprint(pair_ids: Iterable[str]) -> str:
    return fingerprint_rows((pair_id, "") for pair_id in pair_ids)


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


def lane_units(units: Sequence[ExpertUnit]) -> dict[str, Any]:
    """Return what a lane is told of its units, as plain values.

    No ids of pairs are among them: the lane finds those as they were found here. Of 500 experts that leave each
    other's pairs alone, the ids of all others' pairs would be 50 MB and more.

    Raises:
        ValueError: if two units differ in more settings than their length.
    """
    if not units:
        return {"common": {}, "units": []}
    common = {name: value for name, value in units[0].key.identity.items() if name != "name"}
    for unit in units:
        if _with_steps(common, unit.name, unit.dpo.steps) != dict(unit.key.identity):
            raise ValueError(f"expected units of one run, found other settings at {unit.name!r} than at the first")
    return {
        "common": common,
        "recipe_version": units[0].key.recipe_version,
        "units": [
            {"name": unit.name, "group": unit.group, "steps": unit.dpo.steps, "inputs": dict(unit.key.inputs)}
            for unit in units
        ],
    }


def read_lane_units(run: Run, pairs_folder: Location, told: Mapping[str, Any]) -> list[ExpertUnit]:
    """Return the units of `lane_units`, with their pairs from the closed pairs artifact.

    The settings of a unit are those of the command, even where `run` has other paths of the same models.

    Raises:
        SafetyDPOError: if the pairs are not those that the command has seen.
    """
    grouping, everything = _group_kept(run.config.identity, pairs_folder)
    groups = {group.name: group for group in (*grouping.groups, everything)}
    ordered = tuple(sorted(everything.pair_ids))
    units = []
    for each in told["units"]:
        group = groups.get(each["group"])
        if group is None or _fingerprint(group.pair_ids) != each["inputs"]["pairs"]:
            raise SafetyDPOError(
                f"expected the pairs of expert {each['name']!r} in {pairs_folder} as the command planned them, found "
                f"{'other ones' if group else 'no such group'}: the folder was changed since; run the same command "
                "again"
            )
        identity = _with_steps(told["common"], each["name"], each["steps"])
        key = ArtifactKey("experts", each["name"], identity, each["inputs"], told["recipe_version"])
        settings = DpoConfig(**identity["dpo"])
        others = _others(settings, group, ordered)
        ids = tuple(sorted(group.pair_ids))
        units.append(ExpertUnit(each["name"], group.name, ids, others, group.categories, settings, key))
    return units


def _with_steps(common: Mapping[str, Any], name: str, steps: int) -> dict[str, Any]:
    return {"name": name, **common, "dpo": {**common["dpo"], "steps": steps}}
