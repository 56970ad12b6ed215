"""Attack prompts of a run, made once per base model: what they are made from, how, and where they stand.

A Ray Data pool makes each prompt alone and once; the run's artifact `attacks` lists those that it draws. Prompts are
made on the base only, and hence held out from every defended model, but for `white_box`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ray_jobs.cluster import connect
from ray_jobs.expert_files import record_files
from ray_jobs.pools import PoolStage, fill_pool
from ray_jobs.run import Run, config_for_workers
from safetydpo.artifacts.adapters import read_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE, stage_folder
from safetydpo.artifacts.pool_index import read_rows
from safetydpo.artifacts.records import ArtifactKey, Record, read_pointers
from safetydpo.artifacts.schemas import ATTACK_PROMPTS, sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows, read_table, table_from_rows, write_table
from safetydpo.attacks.paraphrases import load_paraphrases
from safetydpo.config.attacks import AttackName
from safetydpo.config.schema import Config, EvaluationConfig, IdentityConfig
from safetydpo.demo.concepts import get_concept, select_concepts
from safetydpo.demo.prompts import PromptRow, write_prompts
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.evaluation.attack_metrics import ATTACK_PREFIX
from safetydpo.prompts.sets import Prompt
from safetydpo.seeding import derive_seed

if TYPE_CHECKING:
    from ray_jobs.evaluate import EvaluatedRow
    from safetydpo.attacks.make import AttackTask

RECIPE_VERSION = 1
STAGE = "attacks"
PROMPTS_FILE = "attack_prompts.parquet"
PASSES_PER_PROMPT = 4
"""Passes of pictures through the denoiser that take as long as finding one prompt by text features, about."""
MANIFEST = pa.schema(
    [
        *(ATTACK_PROMPTS.field(name) for name in ("attack_id", "attack", "concept", "category", "categories", "index")),
        pa.field("names", pa.list_(pa.string()), nullable=False),
        pa.field("frame", pa.string(), nullable=False),
        pa.field("adapter", pa.string(), nullable=False),
    ]
)


def check_attacks(identity: IdentityConfig) -> None:
    """Refuse attacks that cannot be made, before anything is started.

    Raises:
        UsageError: if they have no names to start from, or more paraphrases are asked for than are written.
    """
    evaluation = identity.evaluation
    if not evaluation.attacks:
        return
    if identity.prompts.source != "demo":
        raise UsageError(
            f"expected identity.prompts.source 'demo' with identity.evaluation.attacks, because attacks start from all "
            f"names of a concept, found {identity.prompts.source!r}: leave attacks out, and import a file of attack "
            "prompts as test prompts instead"
        )
    written = min(len(texts) for texts in load_paraphrases().values())
    if "paraphrase" in evaluation.attacks and evaluation.attack_prompts_per_concept > written:
        raise UsageError(
            f"expected at most {written} in identity.evaluation.attack_prompts_per_concept, as many paraphrases as a "
            f"concept has, found {evaluation.attack_prompts_per_concept}: lower it, or leave 'paraphrase' out of "
            "identity.evaluation.attacks"
        )


def with_attacks(run: Run, rows: list[EvaluatedRow], searched: Record | None) -> list[EvaluatedRow]:
    """Make or find the run's attack prompts, and return the rows with them added to what base and attacked rows draw.

    Raises:
        UsageError: if the attack on the adapted model has no searched adapter to attack.
    """
    evaluation = run.config.identity.evaluation
    if not evaluation.attacks:
        return rows
    folder = None if searched is None else record_files(run, searched).path
    make_attack_prompts(run, adapter=None if searched is None else (searched.fingerprint, str(folder)))
    return attacked(rows, evaluation)


def attacked(rows: Sequence[EvaluatedRow], evaluation: EvaluationConfig) -> list[EvaluatedRow]:
    """Return the rows with the attack prompts added to what base and attacked rows draw."""
    sets = tuple(f"{ATTACK_PREFIX}{name}" for name in evaluation.attacks)
    kinds = ("base", *evaluation.attacked_rows) if sets else ()
    return [replace(row, prompt_sets=(*row.prompt_sets, *sets)) if row.source.kind in kinds else row for row in rows]


def count_attacks(identity: IdentityConfig) -> int:
    """Return how many attack prompts a run has."""
    evaluation = identity.evaluation
    if not evaluation.attacks:
        return 0
    each = evaluation.attack_prompts_per_concept
    return len(evaluation.attacks) * sum(len(frames[:each]) for frames in _frames(identity).values())


def attack_sets(run: Run) -> dict[str, list[Prompt]]:
    """Return the attack prompts of the run by prompt set, from the artifact that it points to; empty without attacks.

    Raises:
        SafetyDPOError: if they have not been made.
    """
    attacks = run.config.identity.evaluation.attacks
    if not attacks:
        return {}
    sets: dict[str, list[Prompt]] = {f"{ATTACK_PREFIX}{name}": [] for name in attacks}
    for row in read_attack_prompts(run):
        prompt_set = f"{ATTACK_PREFIX}{row['attack']}"
        sets[prompt_set].append(
            Prompt(
                text=row["text"],
                prompt_set=prompt_set,
                split="test",
                concept=row["concept"],
                category=row["category"],
                categories=tuple(row["categories"]),
                background="",
            )
        )
    return sets


def read_attack_prompts(run: Run) -> list[dict[str, Any]]:
    """Return the rows of the attack prompts that the run points to.

    Raises:
        SafetyDPOError: if there are none.
    """
    pointer = read_pointers(run.run_dir).get(STAGE)
    if pointer is None:
        raise SafetyDPOError(
            f"expected attack prompts (identity.evaluation.attacks) of the run at {run.run_dir}, found none: make them "
            "with `safetydpo attack`"
        )
    file = stage_folder(run.store, pointer["stage"]) / pointer["folder"] / PROMPTS_FILE
    return read_table(file, ATTACK_PROMPTS).to_pylist()


def make_attack_prompts(run: Run, *, adapter: tuple[str, str] | None) -> Record:
    """Make or find the attack prompts of a run; `adapter` is hash and folder of the one that `white_box` attacks.

    Raises:
        UsageError: if `white_box` is asked for without an adapter.
    """
    rows = plan_attacks(run, adapter=adapter)
    identity = run.config.identity
    key = ArtifactKey(
        stage=STAGE,
        name=run.config.name,
        identity={
            "attacks": list(identity.evaluation.attacks),
            "base": identity.base.model_dump(mode="json"),
            "attack_search": identity.attack_search.model_dump(mode="json"),
            "sampler": identity.sampler.model_dump(mode="json"),
            "seed": identity.seed,
        },
        inputs={
            "base": run.base_fingerprint,
            "prompts": fingerprint_rows((str(row["attack_id"]), str(row["concept"])) for row in rows),
        },
        recipe_version=RECIPE_VERSION,
    )
    return run.build(STAGE, key, lambda folder: _make(run, folder, rows))


def plan_attacks(run: Run, *, adapter: tuple[str, str] | None) -> list[dict[str, Any]]:
    """Return a manifest row for every attack prompt: concepts of the test split, each attack, each index."""
    identity = run.config.identity
    evaluation = identity.evaluation
    if "white_box" in evaluation.attacks and adapter is None:
        raise UsageError(
            "expected a searched adapter for the attack 'white_box' of identity.evaluation.attacks, found none: run "
            "the search first, or give --adapter"
        )
    rows = []
    for concept, frames in _frames(identity).items():
        for attack in evaluation.attacks:
            target = adapter if attack == "white_box" and adapter is not None else ("", "")
            for index, row in enumerate(frames[: evaluation.attack_prompts_per_concept]):
                names = get_concept(concept).names
                frame = row.template.replace("{background}", row.background)
                content = {
                    "attack": attack,
                    "concept": concept,
                    "names": list(names),
                    "frame": frame,
                    "banned": list(unsafe_names()),
                    "index": index,
                    "seed": identity.seed,
                    "base": run.base_fingerprint,
                    "adapter": target[0],
                    "wordings": list(load_paraphrases().get(concept, ())) if attack == "paraphrase" else [],
                }
                rows.append(
                    {
                        "attack_id": sha256_of(content),
                        "attack": attack,
                        "concept": concept,
                        "category": row.categories[0],
                        "categories": list(row.categories),
                        "index": index,
                        "names": list(names),
                        "frame": frame,
                        "adapter": target[1],
                    }
                )
    return rows


def unsafe_names() -> tuple[str, ...]:
    """Return every name of every unsafe concept, also of those that no expert sees."""
    concepts = [*select_concepts("unsafe"), *select_concepts("unsafe", ood=True)]
    return tuple(name for concept in concepts for name in concept.names)


def _frames(identity: IdentityConfig) -> dict[str, list[PromptRow]]:
    """Return test prompts of each attacked concept in a seeded order; attacks use their templates and backgrounds."""
    found: dict[str, list[PromptRow]] = {}
    for row in write_prompts("test", "unsafe"):
        found.setdefault(row.concept, []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: derive_seed(identity.seed, "attacks.frames", row.text))
    chosen: set[str] = set()
    for category in identity.prompts.categories:
        members = [concept for concept, rows in found.items() if rows[0].categories[0] == category]
        members.sort(key=lambda concept: derive_seed(identity.seed, "attacks.concepts", concept))
        chosen.update(members[: identity.evaluation.attack_concepts_per_category])
    return {concept: rows for concept, rows in found.items() if concept in chosen}


def _make(run: Run, folder: Location, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    connect(run.config)
    identity = run.config.identity
    settings = identity.attack_search.model_dump(mode="json")
    pool_key = sha256_of(
        [run.base_fingerprint, identity.base.dtype, settings, identity.sampler.model_dump(mode="json"), RECIPE_VERSION]
    )
    stage = PoolStage(
        label="attack prompts",
        output=ATTACK_PROMPTS,
        id_column="attack_id",
        worker=AttackWorker,
        arguments={"config": config_for_workers(run.config).model_dump(mode="json")},
        batch_size=1,
        passes_per_batch=PASSES_PER_PROMPT,
    )
    pool = stage_folder(run.store, STAGE) / f"pool-{pool_key[:12]}"
    index = fill_pool(pool, table_from_rows(list(rows), MANIFEST), stage, execution=run.config.execution)
    table = read_rows(pool, ATTACK_PROMPTS, index, id_column="attack_id")
    made = {row["attack_id"]: row for row in table.to_pylist()}
    ordered = [made[row["attack_id"]] for row in rows]
    write_table(folder / PROMPTS_FILE, table_from_rows(ordered, ATTACK_PROMPTS))
    counts = {name: sum(row["attack"] == name for row in ordered) for name in identity.evaluation.attacks}
    return {
        "fingerprint": fingerprint_rows((row["attack_id"], row["text"]) for row in ordered),
        "counts": counts,
        "details": {"threat_model": _threat_model(identity.evaluation.attacks), "attack_search": settings},
    }


def _threat_model(attacks: Sequence[AttackName]) -> dict[str, str]:
    held_out = "sees the base only, and no defended model"
    sees = {"random": "sees the base's vocabulary only", "white_box": "sees the base and the searched adapter"}
    return {name: sees.get(name, held_out) for name in attacks}


class AttackWorker:
    """Makes one attack prompt after another; the base, or the base with the adapter of the row, stands in memory."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from ray_jobs.workers import worker_device
        from safetydpo.attacks.make import AttackMaker
        from safetydpo.diffusion.build import load_backbone

        self._run = Run(Config.model_validate(config))
        identity = self._run.config.identity
        self._backbone = load_backbone(identity.base, device=worker_device())
        self._maker = AttackMaker(self._backbone, identity.attack_search, identity.sampler)
        self._adapter = ""

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return `attack_prompts` rows, one per manifest row."""
        return table_from_rows([self._make(row) for row in table.to_pylist()], ATTACK_PROMPTS)

    def _make(self, row: Mapping[str, Any]) -> dict[str, object]:
        self._use(row["adapter"])
        made = self._maker.make(self._task(row))
        kept = {name: row[name] for name in ("attack_id", "attack", "concept", "category", "categories", "index")}
        return {**kept, **asdict(made)}

    def _task(self, row: Mapping[str, Any]) -> AttackTask:
        from safetydpo.attacks.make import AttackTask

        return AttackTask(
            attack=row["attack"],
            concept=row["concept"],
            names=tuple(row["names"]),
            frame=row["frame"],
            banned=unsafe_names(),
            index=row["index"],
            seed=self._run.config.identity.seed,
        )

    def _use(self, adapter: str) -> None:
        from safetydpo.dpo.engine import lora_signature

        if adapter == self._adapter:
            return
        if adapter:
            layers, _ = read_adapter(Location(self._run.store.filesystem, adapter) / ADAPTER_FILE)
            self._backbone.swap_adapter(lora_signature(self._run.config.identity.lora), layers)
        else:
            self._backbone.remove_adapter()
        self._adapter = adapter
