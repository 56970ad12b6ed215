"""The training loop of a distilled adapter; draws, answers and loss are in `distillation`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.storage import Location
from safetydpo.config.training import DistillConfig, LoraConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.dpo.checkpoint import TrainingState, encode_checkpoint, training_identity
from safetydpo.dpo.descent import code_of_a_step, descend, is_checkpoint_due, load_start
from safetydpo.dpo.distillation import METRICS, DistillationData, distillation_loss, step_uses
from safetydpo.dpo.engine import Engine
from safetydpo.errors import SafetyDPOError

NAME = "distilled"
METRIC_NAMES = ("step", *METRICS, "gradient_norm", "learning_rate")
"""Columns of `Distilled.history`."""


@dataclass(frozen=True)
class Distilled:
    """A finished adapter."""

    layers: dict[str, LoraLayer]
    history: Float[Tensor, "step metric"]
    """What was measured in every step, named by `METRIC_NAMES`."""
    resumed_at: int
    """Steps that were taken from a checkpoint."""


def distill(
    backbone: Backbone,
    data: DistillationData,
    answers: Float[Tensor, "row draw channel height width"],
    *,
    start: Mapping[str, LoraLayer],
    start_hash: str,
    config: DistillConfig,
    lora: LoraConfig,
    run_seed: int,
    engine: Engine,
    checkpoint: Location | None = None,
    report: Callable[[int], None] = lambda _: None,
    rank: int = 0,
) -> Distilled:
    """Fit one adapter to the answers, from `start` or from the checkpoint if it stands there.

    Args:
        start: layers of rank `lora.rank` (see `pad_rank`), a scale of one.
        start_hash: what a checkpoint must have started from: start, experts and base together.
        lora: signature of the adapter, the one that the engine was opened with.
        report: called with the number of each finished step on every process.

    Raises:
        SafetyDPOError: if the loss is not finite or the checkpoint belongs to something else.
    """
    identity = training_identity(
        expert=f"{NAME}-{start_hash}",
        run_seed=run_seed,
        base_fingerprint=backbone.fingerprint,
        data_fingerprint=data.fingerprint,
        lora=lora,
        dpo=config,
    )
    state = load_start(
        backbone, start, identity=identity, checkpoint=checkpoint, engine=engine, num_metrics=len(METRIC_NAMES)
    )
    history, resumed_at = list(state.history), state.engine.step
    for step in range(resumed_at, config.steps):
        uses = step_uses(data, step, config=config, run_seed=run_seed, rank=rank, world_size=engine.world_size)
        part = partial(distillation_loss, backbone, data, answers, uses, config=config, run_seed=run_seed)
        with code_of_a_step(backbone, config):
            done = descend(engine, [part], config=config, step=step, who="distilled adapter", advice=ADVICE)
        row = (step, *done.measured, done.gradient_norm, done.learning_rate)
        history.append(torch.tensor(row, dtype=torch.float64))
        if checkpoint is not None and is_checkpoint_due(step, config):
            now = TrainingState(engine.state(), 0, torch.stack(history))
            if rank == 0:
                checkpoint.write_bytes(encode_checkpoint(now, identity))
        report(step)
    with engine.published():
        layers = backbone.export_adapter()
    return Distilled(layers, torch.stack(history), resumed_at)


ADVICE = "lower merge.distill.learning_rate"


def pad_rank(layers: Mapping[str, LoraLayer], fresh: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """Return layers with the same deltas and as many components as `fresh` (see `initial_adapter`) has.

    An added component takes its row of A from `fresh` and a column of zeros in B: with both factors zero it would have
    no gradient and stay zero.

    Raises:
        SafetyDPOError: if a layer has more components than that.
    """
    padded = {}
    for name, layer in layers.items():
        present, rank = layer.down.shape[0], fresh[name].down.shape[0]
        if present > rank:
            raise SafetyDPOError(
                f"expected at most {rank} components of {name!r}, found {present}: reduce its rank first"
            )
        down = torch.cat([layer.down, fresh[name].down[present:].to(layer.down)])
        up = torch.cat([layer.up, layer.up.new_zeros((layer.up.shape[0], rank - present))], dim=1)
        padded[name] = LoraLayer(down=down, up=up)
    return padded
