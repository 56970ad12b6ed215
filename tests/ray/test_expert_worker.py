"""A worker of a lane in this process: where its base lies, and what it tells of an expert that ends early."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_jobs.expert_plan import plan_experts
from ray_jobs.expert_watch import LaneWatch, prompts_to_watch
from ray_jobs.expert_worker import _Lane, _Slot, _train_unit, load_training_base
from ray_jobs.lanes import Turn
from ray_jobs.progress import ProgressBoard
from ray_jobs.train_experts import LABEL
from ray_jobs.training_tables import read_training_tables
from safetydpo.artifacts.attempts import take_lease, this_process
from safetydpo.artifacts.records import find_closed
from safetydpo.config.schema import Config
from safetydpo.diffusion.build import load_backbone
from safetydpo.dpo.engine import lora_signature
from tests.ray.closed_artifacts import close_training_data, open_run
from tests.ray.commands import Command
from tests.tiny import build_tiny_model


@pytest.mark.parametrize(("offload", "place"), [("cpu", "cpu"), ("none", "meta")])
def test_an_offloaded_base_waits_on_the_host_from_the_start(tmp_path: Path, offload: str, place: str) -> None:
    """`meta` stands for a device: what is put there has no values. The adapter and the noise schedule go there."""
    build_tiny_model(tmp_path / "model")
    dpo = {"strategy": "deepspeed", "zero_stage": 3, "base_offload": offload}
    content = {"base": {"model": str(tmp_path / "model")}, "dpo": dpo, "lora": {"rank": 2}}
    identity = Config.model_validate({"identity": content}).identity
    backbone = load_training_base(identity, device="meta")
    assert backbone.device.type == "meta"
    weights = dict(backbone.network.named_parameters())
    assert {weight.device.type for weight in weights.values()} == {place}
    if offload == "cpu":
        whole = dict(load_backbone(identity.base).network.named_parameters())
        assert all(torch.equal(weights[name], whole[name]) for name in whole)
    backbone.install_adapter(lora_signature(identity.lora))
    assert {parameter.device.type for _, parameter in backbone.adapter_parameters()} == {"meta"}


@dataclass
class Board:
    """The board of a bar without a process of its own."""

    counts: ProgressBoard = field(default_factory=ProgressBoard)

    @property
    def put(self) -> Any:
        return SimpleNamespace(remote=self.counts.put)


def test_a_training_that_ends_early_is_counted_as_done(command: Command) -> None:
    """Six steps are planned; at a learning rate of nothing no validation is better than the first: it ends before."""
    few = "unsafe_prompts_per_category: 1, neutral_prompts: 1, neighbour_prompts: 1"
    # What is intact is asked of CLIP: of one step of sampling the judge finds nothing.
    validation = f"{{every_steps: 1, patience: 1, clip: demo, {few}}}"
    settings = ["identity.dpo.steps=6", "identity.dpo.learning_rate=1e-12", "identity.dpo.strategy=single"]
    settings += [f"identity.dpo.validation={validation}", "identity.sampler.steps=1", "identity.sampler.batch_size=1"]
    run = open_run(command.config, [*command.places, *settings])
    pairs, folder = close_training_data(run)
    unit = plan_experts(run, pairs, folder)[0]
    backbone = load_training_base(run.config.identity, device="cpu")
    board = Board()
    board.counts.put(LABEL, unit.name, 0)
    worker: Any = SimpleNamespace(rank=0, world_size=1, should_leave=lambda: False)
    slot, watch = _Slot(run, backbone, 1), LaneWatch(run, backbone, rank=0)
    prompts = {unit.name: prompts_to_watch(run.config.identity, unit.categories)}
    lane = _Lane(run, worker, slot, read_training_tables(run, folder), watch, prompts, board)
    attempt = take_lease(run.folder(unit.key), this_process(run="r", lane="l"), newest=0)
    assert attempt is not None
    _train_unit(lane, unit, Turn(0, 1, attempt))
    record = find_closed(run.store, unit.key)
    assert record is not None
    assert 0 < record.counts["steps"] < 6
    assert record.counts["draw_uses"] == record.counts["steps"] * unit.dpo.pairs_per_step
    assert 0 < record.counts["distinct_draws"] <= record.counts["draw_uses"]
    assert board.counts.count(LABEL) == 6
