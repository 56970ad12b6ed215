"""The adapter of merge method `distill`: one training, by Ray Train, on the answers of all experts.

Every process answers its share of the rows with each expert in turn, then all of them train one adapter together.
A killed training answers again (equal answers, since draws come from seeds) and goes on from its last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ray_jobs.cluster import connect
from ray_jobs.expert_files import MERGE_RECIPE_VERSION, MergeAids, expert_folders, load_experts, read_aids
from ray_jobs.expert_plan import benign_fingerprint, plan_experts
from ray_jobs.progress import progress_bar
from ray_jobs.run import Run, config_for_workers, run_id
from ray_jobs.state_folder import ray_state_folder
from ray_jobs.train_experts import CHECKPOINT_FILE
from ray_jobs.trainers import train_on_workers
from ray_jobs.training_tables import TrainingTables, read_training_tables
from safetydpo.artifacts.adapters import AdapterMetadata, adapter_hash, write_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE
from safetydpo.artifacts.records import ArtifactKey, Record, find_closed
from safetydpo.artifacts.schemas import caption_sha256
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import fingerprint_rows
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.schema import Config
from safetydpo.config.training import LoraConfig
from safetydpo.errors import SafetyDPOError

RECIPE_VERSION = 2
LABEL = "distillation steps"


def distill_experts(
    run: Run, experts: Mapping[str, Record], pairs: Record, pairs_folder: Location, *, aids: MergeAids
) -> Record:
    """Make or find the distilled adapter of these experts; `aids` are what its start method needs."""
    members = {name: record for name, record in experts.items() if name != ALL_SINGLE}
    taught = _taught(run, members, pairs, pairs_folder)
    key = distilled_key(run, experts, pairs, pairs_folder, aids=aids)
    if find_closed(run.store, key) is None:
        connect(run.config)
        distill = run.config.identity.merge.distill
        settings = {
            "config": config_for_workers(run.config).model_dump(mode="json"),
            "pairs_folder": pairs_folder.name,
            "experts": expert_folders(run, members),
            "taught": {name: list(pair_ids) for name, pair_ids in taught.items()},
            "aids": aids.folders(run),
            "key": {**vars(key), "identity": dict(key.identity), "inputs": dict(key.inputs)},
        }
        with progress_bar(LABEL, total=distill.steps) as board, ray_state_folder() as state:
            train_on_workers(
                run,
                train_distilled,
                {**settings, "board": board},
                name=f"{run_id(run.config)}-distill",
                state=state,
                num_workers=distill.processes,
            )
        if find_closed(run.store, key) is None:
            raise SafetyDPOError(
                f"expected a distilled adapter in {run.folder(key)}, found none: run the same command again"
            )
        run.made.append(key.folder_name)
    (run.folder(key) / CHECKPOINT_FILE).delete()
    return run.build("distilled", key, lambda _folder: {})


def _taught(
    run: Run, members: Mapping[str, Record], pairs: Record, pairs_folder: Location
) -> dict[str, tuple[str, ...]]:
    return {unit.name: unit.pair_ids for unit in plan_experts(run, pairs, pairs_folder) if unit.name in members}


def distilled_key(
    run: Run, experts: Mapping[str, Record], pairs: Record, pairs_folder: Location, *, aids: MergeAids
) -> ArtifactKey:
    """Return the key of the distilled adapter of these experts; `aids` are what its start method needs."""
    members = {name: record for name, record in experts.items() if name != ALL_SINGLE}
    taught = _taught(run, members, pairs, pairs_folder)
    return _key(run, members, taught, benign_fingerprint(pairs, pairs_folder), aids)


def _key(
    run: Run,
    members: Mapping[str, Record],
    taught: Mapping[str, tuple[str, ...]],
    benign: str,
    aids: MergeAids,
) -> ArtifactKey:
    identity = run.config.identity
    return ArtifactKey(
        stage="distilled",
        name=run.config.name,
        identity={
            "seed": identity.seed,
            "base": identity.base.model_dump(mode="json"),
            "sampler": identity.sampler.model_dump(mode="json"),
            "lora": adapter_config(run.config).model_dump(mode="json"),
            "distill": identity.merge.distill.model_dump(mode="json"),
        },
        inputs={
            "base": run.base_fingerprint,
            "experts": fingerprint_rows((name, record.fingerprint) for name, record in members.items()),
            "pairs": fingerprint_rows((f"{name}:{pair}", "") for name, pair_ids in taught.items() for pair in pair_ids),
            "benign": benign,
            # The merge that it starts from is made here and stands in no artifact of its own.
            "start": f"merge recipe {MERGE_RECIPE_VERSION}, density {identity.merge.density}",
            **aids.fingerprints(),
        },
        recipe_version=RECIPE_VERSION,
    )


def adapter_config(config: Config) -> LoraConfig:
    """Return the LoRA settings of the distilled adapter: those of the experts, its own rank."""
    lora = config.identity.lora
    return lora.model_copy(update={"rank": config.identity.merge.distill.rank or lora.rank, "alpha": None})


def train_distilled(settings: Mapping[str, Any]) -> None:
    """Answer, then train; runs in every worker of a TorchTrainer."""
    import ray.train
    import torch
    import torch.distributed as dist

    from ray_jobs.workers import worker_device
    from safetydpo.diffusion.build import load_backbone
    from safetydpo.dpo.distillation import answer_rows
    from safetydpo.dpo.engine import lora_signature, open_engine

    run = Run(Config(**settings["config"]))
    key = ArtifactKey(**settings["key"])
    if find_closed(run.store, key) is not None:
        return
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, int(run.config.execution.cpus_per_worker)))
    identity = run.config.identity
    distill, lora = identity.merge.distill, adapter_config(run.config)
    backbone = load_backbone(identity.base, device=worker_device())
    tables = read_training_tables(run, run.store / "pairs" / settings["pairs_folder"])
    data = distillation_data(tables, settings["taught"], backbone, run.config)
    experts = load_experts(run, settings["experts"])
    start = _start_layers(run, experts, settings["aids"], backbone)
    answers = answer_rows(
        backbone,
        data,
        {expert.name: expert.layers for expert in experts},
        signature=lora_signature(identity.lora),
        config=distill,
        run_seed=identity.seed,
        rank=rank,
        world_size=world_size,
    )
    if world_size > 1:
        # Every answer is a number on one process and 0 on the others: their sum is exact. NCCL sums on the GPU only.
        shared = answers.to(worker_device() if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(shared)
        answers = shared.cpu()
    engine = open_engine(backbone, config=distill, lora=lora, world_size=world_size)
    try:
        _train(run, key, backbone, engine, data=data, answers=answers, start=start, board=settings["board"], rank=rank)
    finally:
        engine.close()


def distillation_data(tables: TrainingTables, taught: Mapping[str, list[str]], backbone: Any, config: Config) -> Any:
    """Gather the rows of a distillation.

    Of each pair both pictures under the unsafe prompt, which the pair's expert answers; the base answers the safe
    picture under its own prompt and the benign pictures.

    Raises:
        SafetyDPOError: if there is no pair, or latents or captions are missing or broken.
    """
    from safetydpo.dpo.distillation import BASE, DistillationData, TaughtRow

    rows = []
    for name, pair_ids in taught.items():
        for pair_id in pair_ids:
            unsafe, safe = (caption_sha256(text) for text in tables.texts[pair_id])
            pictures = {side: tables.images[pair_id, side][0] for side in ("safe", "unsafe")}
            rows += [
                TaughtRow(name, pictures["safe"], unsafe),
                TaughtRow(name, pictures["unsafe"], unsafe),
                TaughtRow(BASE, pictures["safe"], safe),
            ]
    rows += [
        TaughtRow(BASE, image_id, caption_sha256(prompt))
        for (_owner, side), (image_id, prompt) in tables.images.items()
        if side == "benign"
    ]
    sampler = config.identity.sampler
    return DistillationData.from_tables(
        rows,
        latents=tables.latents,
        embeddings=tables.embeddings,
        pooled=tables.pooled,
        latent_shape=backbone.latent_shape(height=sampler.height, width=sampler.width),
    )


def _start_layers(run: Run, experts: list[Any], aids: Mapping[str, str], backbone: Any) -> Any:
    from safetydpo.diffusion.adapter import initial_adapter
    from safetydpo.dpo.distiller import NAME, pad_rank
    from safetydpo.dpo.engine import lora_signature
    from safetydpo.merging.merge import merge_experts

    distill, lora = run.config.identity.merge.distill, adapter_config(run.config)
    merged = merge_experts(
        experts,
        method=distill.start_method,
        global_scale=distill.start_scale,
        density=run.config.identity.merge.density,
        output_rank=lora.rank,
        seed=run.config.identity.seed,
        **read_aids(run, aids, methods=[distill.start_method]),
    )
    fresh = initial_adapter(
        backbone.named_linear_layers(lora.layer_targets),
        lora_signature(lora),
        base_fingerprint=run.base_fingerprint,
        run_seed=run.config.identity.seed,
        init=lora.init,
        expert_name=NAME,
    )
    return pad_rank(merged.layers, fresh)


def _train(
    run: Run,
    key: ArtifactKey,
    backbone: Any,
    engine: Any,
    *,
    data: Any,
    answers: Any,
    start: Any,
    board: Any,
    rank: int,
) -> None:
    from safetydpo.dpo.distiller import METRIC_NAMES, distill

    folder = run.folder(key)
    checkpoint = folder / CHECKPOINT_FILE

    def count(_step: int) -> None:
        if rank == 0:
            board.add.remote(LABEL, 1)

    def make(_folder: Location) -> Mapping[str, Any]:
        done = distill(
            backbone,
            data,
            answers,
            start=start,
            start_hash=key.hash,
            config=run.config.identity.merge.distill,
            lora=adapter_config(run.config),
            run_seed=run.config.identity.seed,
            engine=engine,
            checkpoint=checkpoint,
            report=count,
            rank=rank,
        )
        if rank == 0:
            metadata = AdapterMetadata(
                base_fingerprint=backbone.fingerprint,
                denoiser=backbone.denoiser,
                training_hash=key.hash,
                kind="merged",
                categories=tuple(run.config.identity.prompts.categories),
            )
            rows = (dict(zip(METRIC_NAMES, row.tolist(), strict=True)) for row in done.history)
            lines = [json.dumps(row, sort_keys=True) for row in rows]
            (folder / "training.jsonl").write_bytes("\n".join(lines).encode() + b"\n")
            write_adapter(folder / ADAPTER_FILE, done.layers, metadata=metadata)
        return {
            "fingerprint": adapter_hash(done.layers),
            "counts": {"taught": len(data.taught), "benign": len(data.benign), "resumed_at": done.resumed_at},
        }

    if rank == 0:
        run.make(key, make)
        checkpoint.delete()
    else:
        make(folder)
