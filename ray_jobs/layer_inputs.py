"""What Co-Merge and RegMean need of the base model: layer inputs and their moments, collected once by Ray Data.

A unit of work is a group of prompts (a category, or the benign ones). Moments are float32 sums, whose last bits depend
on the order of addition; a group's sum is made by one worker, in the order of its prompts, and forward passes hold the
same rows whoever makes them. So the bytes do not depend on the number of workers, nor on one that was lost. A forward
pass at the border of two groups is made for each of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from ray_jobs.cluster import connect
from ray_jobs.expert_files import INPUTS_FILE, MOMENTS_FILE
from ray_jobs.pools import PoolStage, fill_pool
from ray_jobs.prompt_tables import needed_prompts, split_prompts, spread_prompts
from ray_jobs.resources import task_options
from ray_jobs.run import Run
from ray_jobs.workers import worker_device
from safetydpo.artifacts.leases import LeaseTaken, hold_lease
from safetydpo.artifacts.records import ArtifactKey, Record, find_closed
from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.schema import Config
from safetydpo.merging.moments import BENIGN
from safetydpo.seeding import derive_seed

RECIPE_VERSION = 2
BENIGN_FACTOR = 2
"""Neutral prompts behind the benign moment, as a multiple of the unsafe ones of one category."""
PARTS_FOLDER = "parts"
"""Working files of an artifact that is not closed yet; gone afterwards."""
GROUPS = pa.schema(
    [pa.field("group_id", pa.string(), nullable=False), pa.field("group", pa.string(), nullable=False)],
)
PARTS = pa.schema(
    [
        pa.field("group_id", pa.string(), nullable=False),
        # Of the part's files, which are too large for a table.
        pa.field("inputs_sha256", pa.string(), nullable=False),
        pa.field("moments_sha256", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class GroupedPrompt:
    """A prompt and its group: a category, or `BENIGN`."""

    group: str
    text: str


def collect_layer_inputs(run: Run) -> Record:
    """Make or find the layer inputs of the base model on unsafe training prompts of all categories.

    Their second moments per category are kept too, and those of as many neutral training prompts as unsafe ones of
    one category. Nothing here depends on experts: one more finds the artifact closed.
    """
    prompts = chosen_prompts(run)
    key = layer_inputs_key(run, prompts)
    # One command at a time from the first part to the record: the parts are deleted once it stands.
    with one_maker(run, key):
        record = run.build("layer_inputs", key, lambda folder: _make(run, folder, prompts))
        parts = run.folder(key) / PARTS_FOLDER
        if parts.is_folder():
            parts.delete()
    return record


def layer_inputs_key(run: Run, prompts: Sequence[GroupedPrompt]) -> ArtifactKey:
    """Return the key of the layer inputs on the run's `chosen_prompts`."""
    identity = run.config.identity
    return ArtifactKey(
        stage="layer_inputs",
        name=run.config.name,
        identity={
            "seed": identity.seed,
            "base": identity.base.model_dump(mode="json"),
            "sampler": identity.sampler.model_dump(mode="json"),
            "targets": list(identity.lora.layer_targets),
            "timesteps": list(identity.merge.activation_timesteps),
        },
        inputs={
            "base": run.base_fingerprint,
            "prompts": sha256_of([(prompt.group, prompt.text) for prompt in prompts]),
        },
        recipe_version=RECIPE_VERSION,
    )


@contextmanager
def one_maker(run: Run, key: ArtifactKey) -> Iterator[None]:
    """Hold the artifact's lease while the block runs, waiting as long as another command makes it."""
    with ExitStack() as stack:
        while find_closed(run.store, key) is None:
            try:
                stack.enter_context(hold_lease(run.folder(key).make_folder(), patience_seconds=60.0))
                break
            except LeaseTaken:
                continue
        yield


def chosen_prompts(run: Run) -> list[GroupedPrompt]:
    """Return the prompts in order: unsafe ones category by category, then the benign ones."""
    identity = run.config.identity
    setting = "identity.merge.activation_prompts_per_category"
    count = identity.merge.activation_prompts_per_category
    training = needed_prompts(identity.prompts, "train", "unsafe", setting=setting)
    unsafe = [
        prompt
        for category in identity.prompts.categories
        for prompt in spread_prompts(
            [row for row in training if row.category == category],
            count,
            seed=identity.seed,
            purpose="activations",
        )
    ]
    neutral = split_prompts(identity.prompts, "train", "neutral")
    benign = spread_prompts(neutral, count * BENIGN_FACTOR, seed=identity.seed, purpose="activations")
    return [GroupedPrompt(prompt.category, prompt.text) for prompt in unsafe] + [
        GroupedPrompt(BENIGN, prompt.text) for prompt in benign
    ]


def _make(run: Run, folder: Location, prompts: Sequence[GroupedPrompt]) -> Mapping[str, Any]:
    connect(run.config)
    identity, execution = run.config.identity, run.config.execution
    groups = list(dict.fromkeys(prompt.group for prompt in prompts))
    pairs = [(prompt.group, prompt.text) for prompt in prompts]
    parts = folder / PARTS_FOLDER
    batches = -(-len(prompts) // identity.sampler.batch_size)
    stage = PoolStage(
        label="layer inputs",
        output=PARTS,
        id_column="group_id",
        worker=InputsWorker,
        arguments={"config": run.config.model_dump(mode="json"), "prompts": pairs, "folder": parts.path},
        batch_size=1,
        passes_per_batch=-(-batches // len(groups))
        * (identity.sampler.steps + len(identity.merge.activation_timesteps)),
    )
    manifest = table_from_rows([{"group_id": sha256_of(group), "group": group} for group in groups], GROUPS)
    fill_pool(parts, manifest, stage, execution=execution)
    task = _join_task.options(**task_options(execution, with_gpu=False))
    config = run.config.model_dump(mode="json")
    made: Mapping[str, Any] = ray.get(task.remote(config, run.base_fingerprint, pairs, folder.path))
    return made


class InputsWorker:
    """Collects the layer inputs of groups of prompts, each into files of its own."""

    def __init__(self, config: Mapping[str, Any], prompts: Sequence[tuple[str, str]], folder: str) -> None:
        from safetydpo.diffusion.build import load_backbone

        self._run = Run(Config.model_validate(config))
        self._prompts = [tuple(pair) for pair in prompts]
        self._folder = Location(self._run.store.filesystem, folder)
        self._backbone = load_backbone(self._run.config.identity.base, device=worker_device())

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return a `PARTS` row per group."""
        return table_from_rows([self._collect(row["group_id"], row["group"]) for row in table.to_pylist()], PARTS)

    def _collect(self, group_id: str, group: str) -> dict[str, object]:
        from safetydpo.merging.activations import collect_inputs, inputs_to_bytes
        from safetydpo.merging.moments import MomentSums, moments_to_bytes

        identity = self._run.config.identity
        sums = MomentSums([name for name, _ in self._prompts])
        inputs = collect_inputs(
            self._backbone,
            prompts=[text for _, text in self._prompts],
            seeds=[derive_seed(identity.seed, "activation_noise", text) for _, text in self._prompts],
            timesteps=identity.merge.activation_timesteps,
            targets=identity.lora.layer_targets,
            sampler=identity.sampler,
            observe=sums,
            chosen=[row for row, (name, _) in enumerate(self._prompts) if name == group],
        )
        base = self._backbone.fingerprint
        files = {
            INPUTS_FILE: inputs_to_bytes(inputs, base_fingerprint=base),
            MOMENTS_FILE: moments_to_bytes(sums.means(), base_fingerprint=base),
        }
        for name, data in files.items():
            part_file(self._folder, group_id, name).write_bytes(data)
        inputs_sha256, moments_sha256 = (hashlib.sha256(data).hexdigest() for data in files.values())
        return {"group_id": group_id, "inputs_sha256": inputs_sha256, "moments_sha256": moments_sha256}


def part_file(parts: Location, group_id: str, name: str) -> Location:
    """Return the file of one group's layer inputs or moments."""
    return parts / "files" / f"{group_id[:16]}-{name}"


@ray.remote
def _join_task(
    config: dict[str, Any], base_fingerprint: str, prompts: Sequence[tuple[str, str]], target: str
) -> dict[str, Any]:
    from safetydpo.merging.activations import inputs_from_bytes, inputs_to_bytes, join_inputs
    from safetydpo.merging.moments import moments_from_bytes, moments_to_bytes

    run = Run(Config.model_validate(config))
    folder = Location(run.store.filesystem, target)
    groups = list(dict.fromkeys(group for group, _ in prompts))

    def read(group: str, name: str, parse: Any) -> Any:
        file = part_file(folder / PARTS_FOLDER, sha256_of(group), name)
        return parse(file.read_bytes(), source=str(file), base_fingerprint=base_fingerprint)

    # Votes are cast on unsafe prompts; the benign ones count for the moments only.
    inputs = join_inputs(
        {group: read(group, INPUTS_FILE, inputs_from_bytes) for group in groups if group != BENIGN},
        [group for group, _ in prompts if group != BENIGN],
    )
    moments: dict[str, dict[str, Any]] = {}
    for group in groups:
        for module, found in read(group, MOMENTS_FILE, moments_from_bytes).items():
            moments.setdefault(module, {}).update(found)
    files = {
        INPUTS_FILE: inputs_to_bytes(inputs, base_fingerprint=base_fingerprint),
        MOMENTS_FILE: moments_to_bytes(moments, base_fingerprint=base_fingerprint),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {
        "fingerprint": sha256_of([hashlib.sha256(data).hexdigest() for data in files.values()]),
        "counts": {"layers": len(inputs), "prompts": len(prompts)},
    }
