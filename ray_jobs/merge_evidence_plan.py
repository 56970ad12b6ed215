"""Which merges are measured: units in the order of work, the config behind each, and what decides its numbers."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ray_jobs import distill_experts, expert_plan, layer_inputs, merge_bench
from ray_jobs.evidence import prompts_fingerprint
from ray_jobs.expert_files import MERGE_RECIPE_VERSION
from ray_jobs.final_judges import judges_fingerprint
from ray_jobs.places import PAIRS_RECIPE_VERSION
from ray_jobs.prompt_tables import all_pairs
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.merge_evidence import Factor
from safetydpo.config.schema import BaseModelConfig, Config, PromptsConfig
from safetydpo.diffusion.build import base_fingerprint
from safetydpo.errors import UsageError
from safetydpo.evaluation.merge_curve import Tuning, list_tunings, order_concepts
from safetydpo.evaluation.merge_units import MergeUnit, parse_merge_unit
from safetydpo.merging.registry import METHODS, find_method
from safetydpo.pairs.groups import concept_group_name

RECIPE_VERSION = 1
"""How candidates are chosen and counted."""
PARTS = ("screen", "grid", "factors")
RANKS = {"rank_1": 1, "rank_16": 16}
PROTOCOL = ("scales", "densities", "scale_factors", "validated", "retention", "small", "full", "test")
"""Settings of `merge_evidence` that decide a unit's numbers; the others say which units there are."""


@dataclass(frozen=True)
class PlannedMerge:
    """One method at one number of experts, one seed and one factor."""

    config: Config
    method: str
    count: int
    seed: int
    factor: Factor

    @property
    def name(self) -> str:
        """What people call it."""
        factor = "" if self.factor == "main" else f", {self.factor}"
        return f"{self.method}, {self.count} experts, seed {self.seed}{factor}"

    @property
    def results(self) -> Location:
        """Folder of all records."""
        return open_location(self.config.merge_evidence.results)

    @property
    def file(self) -> Location:
        """Where the unit's record stands or will stand."""
        return self.results / f"{self.method}-{self.count}-{self.factor}-seed{self.seed}.json"

    @cached_property
    def concepts(self) -> tuple[str, ...]:
        """Concepts that an expert is in the merge for."""
        return ordered_concepts(self.config.identity.prompts, self.seed)[: self.count]

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts of the merge; for `all_single` that of the one adapter."""
        if self.method == ALL_SINGLE:
            return (f"covered_{self.count}",)
        return tuple(concept_group_name(concept) for concept in self.concepts)

    @property
    def merged_by(self) -> str:
        """Merge method that makes its candidates: an adapter trained on everything has a scale and nothing else."""
        return "sum" if self.method == ALL_SINGLE else self.method

    @property
    def tunings(self) -> list[Tuning]:
        """Its candidates."""
        settings = self.config.merge_evidence
        return list_tunings(
            self.count,
            uses_density=find_method(self.merged_by).uses_density,
            scales=settings.scales,
            densities=settings.densities,
            scale_factors=settings.scale_factors,
        )

    @cached_property
    def run(self) -> Run:
        """The run whose experts it merges; experts of equal settings lie in one store and are trained once."""
        return Run(with_absolute_paths(unit_config(self)))

    @cached_property
    def identity_hash(self) -> str:
        """Hash over what decides the numbers, known before anything is run."""
        identity = self.run.config.identity.model_dump(mode="json", exclude={"search", "evaluation"})
        identity["merge"].pop("methods")
        if not find_method(self.merged_by).needs_distilled:
            identity["merge"].pop("distill")
        return sha256_of(
            {
                "identity": identity,
                "unit": [self.method, self.count, self.concepts],
                "protocol": self.config.merge_evidence.model_dump(mode="json", include=set(PROTOCOL)),
                **_weights_fingerprint(self.config.identity.base),
                "prompts": prompts_fingerprint(self.config),
                "recipes": {
                    "pairs": PAIRS_RECIPE_VERSION,
                    "train": expert_plan.RECIPE_VERSION,
                    "distill": distill_experts.RECIPE_VERSION,
                    "layer_inputs": layer_inputs.RECIPE_VERSION,
                    "merge": MERGE_RECIPE_VERSION,
                    "measure": merge_bench.RECIPE_VERSION,
                    "merge_evidence": RECIPE_VERSION,
                },
            }
        )

    def read(self) -> MergeUnit | None:
        """Return the record if it stands and is of this identity, else None."""
        if not self.file.is_file():
            return None
        unit = parse_merge_unit(self.file.read_bytes().decode(), source=str(self.file))
        return unit if unit.identity_hash == self.identity_hash else None

    @property
    def state(self) -> str:
        """`done`, `other` (a record of another identity stands there) or `to do`."""
        return "done" if self.read() is not None else "other" if self.file.is_file() else "to do"


# Asked by every one of a hundred and more units, and the same for all.
@functools.cache
def ordered_concepts(prompts: PromptsConfig, seed: int) -> tuple[str, ...]:
    """Return all unsafe concepts of the training pairs in the order in which experts cover them."""
    by_category: dict[str, set[str]] = defaultdict(set)
    for pair in all_pairs(prompts):
        by_category[pair.category].add(pair.concept)
    return tuple(order_concepts({name: sorted(members) for name, members in by_category.items()}, seed=seed))


@functools.cache
def _weights_fingerprint(base: BaseModelConfig) -> dict[str, str]:
    return {"base": base_fingerprint(base), "judges": judges_fingerprint()}


def unit_config(unit: PlannedMerge) -> Config:
    """Return the config of the run behind a unit: its seed, its factor, and a run folder of its own."""
    config, factor = unit.config, unit.factor
    identity = config.identity
    rank = RANKS.get(factor, identity.lora.rank)
    summed = rank * unit.count
    output: int | None = {"rank_2r": 2 * rank, "rank_sum": None}.get(factor, rank)
    lora = {"rank": rank} | ({"init": "independent"} if factor == "independent" else {})
    merge = identity.merge.model_dump(mode="json")
    merge |= {"output_rank": output, "distill": {**merge["distill"], "rank": output or summed}}
    folder = f"{unit.seed}-{factor}-{unit.count}"
    # Only the experts of this merge are trained; they are those of any other run that groups pairs so.
    groups = {name: {"concept": [concept]} for name, concept in zip(unit.experts, unit.concepts, strict=False)}
    dpo = identity.dpo.model_dump(mode="json")
    if unit.method == ALL_SINGLE:
        # Trained at the rank of the output: nothing is cut off afterwards.
        lora["rank"] = summed if factor == "rank_sum" else rank
        merge["output_rank"] = None
        groups = {unit.experts[0]: {"concept": list(unit.concepts)}}
        dpo["steps"] *= unit.count
        if factor == "rank_sum":
            # With alpha = rank a step moves the weights by as much more as there are components: at the rate of one
            # expert it diverges (docs/training.md has the ablation, and 35 concepts at rank 140 did too).
            dpo["learning_rate"] /= unit.count
        folder += f"-{ALL_SINGLE}"
    changes = {
        "seed": unit.seed,
        "merge": merge,
        "dpo": dpo,
        "lora": identity.lora.model_dump(mode="json") | lora,
        "experts": {"group_by": "none", "groups": groups, "all_single": False},
    }
    whole = config.model_dump(mode="json", exclude={"evidence", "merge_evidence"})
    whole["identity"] |= changes
    whole["execution"]["run_dir"] = f"{config.execution.run_dir.rstrip('/')}-{folder}"
    return Config.model_validate(whole)


def plan_merges(
    config: Config,
    *,
    part: str | None = None,
    seed: int | None = None,
    method: str | None = None,
    count: int | None = None,
) -> list[PlannedMerge]:
    """Return the units of a part or of all parts, in the order of work, each once.

    First the screen, then the grid seed by seed and count by count, then the factors.

    Raises:
        UsageError: if part, seed, method or count are none of the config's, a method does not exist, or there are fewer
            concepts than experts.
    """
    settings = config.merge_evidence
    _check_methods(settings.screened, settings.methods, settings.factor_methods)
    first = settings.seeds[0]
    # A distillation is a training of its own: what needs none comes first.
    screened = settings.screened or tuple(sorted(METHODS, key=lambda name: (METHODS[name].needs_distilled, name)))
    wanted: dict[str, list[tuple[str, int, int, Factor]]] = {
        "screen": [(name, settings.screen_count, first, "main") for name in screened],
        "grid": [
            (name, number, each, "main")
            for each in settings.seeds
            for number in settings.counts
            for name in settings.methods
        ],
        "factors": list(_factor_units(config, first)),
    }
    _check_choice("part", part, PARTS)
    keys = list(dict.fromkeys(key for name in PARTS if part in (None, name) for key in wanted[name]))
    for what, value, known in (
        ("seed", seed, settings.seeds),
        ("method", method, tuple(dict.fromkeys(key[0] for key in keys))),
        ("count", count, tuple(sorted({key[1] for key in keys}))),
    ):
        _check_choice(what, value, known)
    available = len(ordered_concepts(config.identity.prompts, first))
    largest = max((key[1] for key in keys), default=0)
    if largest > available:
        raise UsageError(
            f"expected at most as many experts as there are unsafe concepts ({available}) in merge_evidence, found "
            f"{largest}: lower counts, screen_count and factor_counts, or add concepts"
        )
    return [
        PlannedMerge(config, *key)
        for key in keys
        if method in (None, key[0]) and count in (None, key[1]) and seed in (None, key[2])
    ]


def _factor_units(config: Config, seed: int) -> Iterable[tuple[str, int, int, Factor]]:
    settings = config.merge_evidence
    methods = settings.factor_methods or settings.methods
    for number in settings.factor_counts:
        yield from ((name, number, seed, "main") for name in methods)
        if settings.all_single and methods:
            yield from ((ALL_SINGLE, number, seed, "main"), (ALL_SINGLE, number, seed, "rank_sum"))
    for factor in settings.factors:
        for number in settings.factor_counts:
            yield from ((name, number, seed, factor) for name in methods)


def _check_methods(*lists: Sequence[str]) -> None:
    for name in dict.fromkeys(name for names in lists for name in names):
        try:
            find_method(name)
        except UsageError as error:
            raise UsageError(f"{error}: correct merge_evidence") from error


def _check_choice(what: str, value: object, known: Sequence[object]) -> None:
    if value is not None and value not in known:
        shown = ", ".join(map(str, known)) or "none, since merge_evidence names no methods"
        raise UsageError(f"expected a {what} of merge_evidence ({shown}), found {value!r}: choose one")
