"""Experts whose lane has two workers, through Ray Train: the expert of one process, with DDP and with ZeRO 3."""

from __future__ import annotations

import pytest

from ray_jobs.expert_plan import plan_experts
from ray_jobs.expert_worker import load_training_base
from ray_jobs.train_experts import train_experts
from ray_jobs.training_tables import preference_data, read_training_tables
from safetydpo.artifacts.adapters import read_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE, attempt_folder
from safetydpo.dpo.engine import open_engine
from safetydpo.dpo.held_out import split_held_out
from safetydpo.dpo.trainer import train_expert
from tests.dpo.runs import largest_difference
from tests.ray.closed_artifacts import close_training_data, open_run
from tests.ray.commands import Command

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
SETTINGS = (
    "identity.prompts.categories=[violence]",
    "identity.prompts.pairs_per_category=4",
    "identity.prompts.retention_prompts=2",
    "identity.experts.all_single=false",
    "identity.dpo.retention_weight=1",
    "identity.dpo.retention_per_step=4",
    "identity.dpo.steps=2",
    "identity.dpo.checkpoint_every=1",
    "execution.num_workers=1",
)
# A path below the folder that the command is given in: workers of Ray Train have others.
LOOKS = "{every_steps: 2, held_out_rate: 0.25, unsafe_prompts_per_category: 1, neutral_prompts: 1, neighbour_prompts: 1"
LOOKS += ", clip: safetydpo/demo/weights/clip}"


@pytest.mark.parametrize(
    "changes",
    [
        ("identity.dpo.strategy=ddp", f"identity.dpo.validation={LOOKS}", "identity.sampler.steps=1"),
        ("identity.dpo.strategy=deepspeed", "identity.dpo.zero_stage=3", "identity.dpo.pairs_per_forward=1"),
    ],
    ids=["ddp, validated", "ZeRO 3, in parts"],
)
def test_two_workers_of_a_lane_train_the_expert_of_one_process(
    command: Command, root: object, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]
) -> None:
    """Two steps of 4 pairs and 4 benign pictures, half of them on each worker; the adapters agree to 1e-5.

    Sums over rows have another order then, and ZeRO 3 changes sums inside the network (`test_two_processes.py`).
    """
    monkeypatch.chdir(str(root))
    settings = [*command.places, *SETTINGS, *changes]
    run = open_run(command.config, [*settings, "execution.workers_per_expert=2"])
    pairs, folder = close_training_data(run)
    (unit,) = plan_experts(run, pairs, folder)
    (record,) = train_experts(run, pairs, folder).values()
    assert (record.counts["steps"], record.details["attempt"]) == (2, 1)
    files = attempt_folder(run.folder(unit.key), 1)
    layers, _ = read_adapter(files / ADAPTER_FILE)
    assert (files / "grids").is_folder() == ("validation" in changes[1])

    backbone = load_training_base(run.config.identity, device="cpu")
    alone = unit.dpo.model_copy(
        update={"strategy": "single", "validation": unit.dpo.validation.model_copy(update={"every_steps": None})}
    )
    data = preference_data(read_training_tables(run, folder), unit, backbone, run.config)
    if unit.dpo.validation.every_steps is not None:
        data, _ = split_held_out(data, rate=0.25, run_seed=run.config.identity.seed)
        if record.details["validation"]["published"]["step"] == 0:
            alone = alone.model_copy(update={"learning_rate": 1e-30})
    lora = run.config.identity.lora
    trained = train_expert(
        backbone,
        data,
        config=alone,
        lora=lora,
        run_seed=run.config.identity.seed,
        expert_name=unit.name,
        engine=open_engine(backbone, config=alone, lora=lora),
    )
    assert largest_difference(trained.layers, layers) < 1e-5
