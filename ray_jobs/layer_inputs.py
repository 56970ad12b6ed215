"""What Co-Merge and RegMean need of the base model: layer inputs and their moments, collected once by Ray Data.

Moments are large (d_in x d_in numbers per layer and group, 4.8 GB a group at the shapes of SDXL) and are made only for
runs that merge by a method that needs them. A worker holds those of one group; what comes after it holds one tensor.

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
from enum import Enum
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
        # Of the part's files, which are too large for a table; "" for a file that is not wanted.
        pa.field("inputs_sha256", pa.string(), nullable=False),
        pa.field("moments_sha256", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class GroupedPrompt:
    """A prompt and its group: a category, or `BENIGN`."""

    group: str
    text: str


class Content(Enum):
    """What is collected: the files of the artifact."""

    INPUTS = (INPUTS_FILE,)
    INPUTS_AND_MOMENTS = (INPUTS_FILE, MOMENTS_FILE)


def collect_layer_inputs(run: Run, content: Content) -> Record:
    """Make or find the layer inputs of the base model on unsafe training prompts of all categories.

    With moments, the inputs' second moments per category are kept too, and those of as many neutral training prompts as
    unsafe ones of one category. Nothing here depends on experts: one more finds the artifact closed.
    """
    prompts = chosen_prompts(run)
    keys = _keys(run, prompts, content)
    key = next((key for key in keys if find_closed(run.store, key) is not None), keys[0])
    # One command at a time from the first part to the record: the parts are deleted once it stands.
    with one_maker(run, key):
        record = run.build("layer_inputs", key, lambda folder: _make(run, folder, prompts, content))
        parts = run.folder(key) / PARTS_FOLDER
        if parts.is_folder():
            parts.delete()
    return record


def find_layer_inputs(run: Run, content: Content) -> Record | None:
    """Find what `collect_layer_inputs` would make or find; None if it is not closed."""
    found = (find_closed(run.store, key) for key in _keys(run, chosen_prompts(run), content))
    return next((record for record in found if record is not None), None)


def layer_inputs_key(run: Run, prompts: Sequence[GroupedPrompt], content: Content) -> ArtifactKey:
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
            # Only where there are none: all that was stored before has them.
            **({"moments": False} if content is Content.INPUTS else {}),
        },
        inputs={
            "base": run.base_fingerprint,
            "prompts": sha256_of([(prompt.group, prompt.text) for prompt in prompts]),
        },
        recipe_version=RECIPE_VERSION,
    )


def _keys(run: Run, prompts: Sequence[GroupedPrompt], content: Content) -> list[ArtifactKey]:
    """Return the keys of the artifacts that serve, the one to make first.

    Inputs with moments serve where none are needed, but what a run was merged with stays the first choice, so that
    moments that another run makes later change none of its keys.
    """
    wanted = [Content.INPUTS, Content.INPUTS_AND_MOMENTS] if content is Content.INPUTS else [content]
    return [layer_inputs_key(run, prompts, one) for one in wanted]


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


def _make(run: Run, folder: Location, prompts: Sequence[GroupedPrompt], content: Content) -> Mapping[str, Any]:
    connect(run.config)
    identity, execution = run.config.identity, run.config.execution
    groups = _groups([prompt.group for prompt in prompts], content)
    pairs = [(prompt.group, prompt.text) for prompt in prompts]
    parts = folder / PARTS_FOLDER
    batches = -(-len(prompts) // identity.sampler.batch_size)
    config = run.config.model_dump(mode="json")
    stage = PoolStage(
        label="layer inputs",
        output=PARTS,
        id_column="group_id",
        worker=InputsWorker,
        arguments={"config": config, "prompts": pairs, "folder": parts.path, "content": content},
        batch_size=1,
        passes_per_batch=-(-batches // len(groups))
        * (identity.sampler.steps + len(identity.merge.activation_timesteps)),
    )
    manifest = table_from_rows([{"group_id": sha256_of(group), "group": group} for group in groups], GROUPS)
    fill_pool(parts, manifest, stage, execution=execution)
    task = _join_task.options(**task_options(execution, with_gpu=False))
    made: Mapping[str, Any] = ray.get(task.remote(config, run.base_fingerprint, pairs, folder.path, content))
    return made


def _groups(names: Sequence[str], content: Content) -> list[str]:
    """Return the groups that are collected: votes are cast on unsafe prompts, the benign ones are for moments only.

    Benign prompts still fill the last batch of unsafe ones, so that inputs are the same to the byte either way.
    """
    return [name for name in dict.fromkeys(names) if content is Content.INPUTS_AND_MOMENTS or name != BENIGN]


class InputsWorker:
    """Collects the layer inputs of groups of prompts, each into files of its own."""

    def __init__(
        self, config: Mapping[str, Any], prompts: Sequence[tuple[str, str]], folder: str, content: Content
    ) -> None:
        from safetydpo.diffusion.build import load_backbone

        self._run = Run(Config.model_validate(config))
        self._prompts = [tuple(pair) for pair in prompts]
        self._content = content
        self._folder = Location(self._run.store.filesystem, folder)
        self._backbone = load_backbone(self._run.config.identity.base, device=worker_device())

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return a `PARTS` row per group."""
        return table_from_rows([self._collect(row["group_id"], row["group"]) for row in table.to_pylist()], PARTS)

    def _collect(self, group_id: str, group: str) -> dict[str, object]:
        from safetydpo.merging.activations import collect_inputs, inputs_to_bytes
        from safetydpo.merging.moments import MomentSums, write_moments

        identity = self._run.config.identity
        has_moments = self._content is Content.INPUTS_AND_MOMENTS
        sums = MomentSums([name for name, _ in self._prompts])
        inputs = collect_inputs(
            self._backbone,
            prompts=[text for _, text in self._prompts],
            seeds=[derive_seed(identity.seed, "activation_noise", text) for _, text in self._prompts],
            timesteps=identity.merge.activation_timesteps,
            targets=identity.lora.layer_targets,
            sampler=identity.sampler,
            observe=sums if has_moments else None,
            chosen=[row for row, (name, _) in enumerate(self._prompts) if name == group],
        )
        base = self._backbone.fingerprint
        data = inputs_to_bytes(inputs, base_fingerprint=base)
        part_file(self._folder, group_id, INPUTS_FILE).write_bytes(data)
        place = part_file(self._folder, group_id, MOMENTS_FILE)
        return {
            "group_id": group_id,
            "inputs_sha256": hashlib.sha256(data).hexdigest(),
            "moments_sha256": write_moments(place, sums, base_fingerprint=base) if has_moments else "",
        }


def part_file(parts: Location, group_id: str, name: str) -> Location:
    """Return the file of one group's layer inputs or moments."""
    return parts / "files" / f"{group_id[:16]}-{name}"


@ray.remote
def _join_task(
    config: dict[str, Any], base_fingerprint: str, prompts: Sequence[tuple[str, str]], target: str, content: Content
) -> dict[str, Any]:
    run = Run(Config.model_validate(config))
    folder = Location(run.store.filesystem, target)
    return join_parts(folder, [group for group, _ in prompts], content, base_fingerprint=base_fingerprint)


def join_parts(
    folder: Location, prompt_groups: Sequence[str], content: Content, *, base_fingerprint: str
) -> dict[str, Any]:
    """Write an artifact's files from those of its groups, one tensor in memory at a time; return what `Run.make` takes.

    `prompt_groups` are the groups of all prompts in order.

    Raises:
        SafetyDPOError: if the file of a group is missing, damaged, or of another base model.
    """
    from safetydpo.merging.activations import join_input_files
    from safetydpo.merging.moments import join_moments

    def files(name: str) -> dict[str, Location]:
        return {
            group: part_file(folder / PARTS_FOLDER, sha256_of(group), name) for group in _groups(prompt_groups, content)
        }

    voting = [group for group in prompt_groups if group != BENIGN]
    voters = {group: file for group, file in files(INPUTS_FILE).items() if group != BENIGN}
    inputs_sha256, num_layers = join_input_files(
        folder / INPUTS_FILE, voters, voting, base_fingerprint=base_fingerprint
    )
    hashes = [inputs_sha256]
    if content is Content.INPUTS_AND_MOMENTS:
        parts = list(files(MOMENTS_FILE).values())
        hashes.append(join_moments(folder / MOMENTS_FILE, parts, base_fingerprint=base_fingerprint))
    num_prompts = len(prompt_groups) if content is Content.INPUTS_AND_MOMENTS else len(voting)
    return {"fingerprint": sha256_of(hashes), "counts": {"layers": num_layers, "prompts": num_prompts}}
