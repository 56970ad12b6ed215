"""One process of a small training over gloo, run as a module, and the start of two of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from safetydpo.artifacts.storage import open_location
from safetydpo.config.training import LoraConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.engine import open_engine
from safetydpo.dpo.trainer import StepMetrics, train_expert
from tests.dpo.preferences import make_preferences, small_config


class StopError(Exception):
    """Ends the process after a step, as a kill would."""


def launch(model: Path, checkpoint: Path, *, stop_after: int, settings: dict[str, Any]) -> None:
    """Train with `settings` in two processes up to the checkpoint after `stop_after` steps."""
    command = [sys.executable, "-m", "tests.dpo.two_processes", str(model), str(checkpoint), f"{checkpoint}.store"]
    workers = [
        subprocess.Popen(
            [*command, json.dumps(settings), str(rank), "2", str(stop_after)],
            env={**os.environ, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=800)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), "\n".join(outputs)[-4000:]


def main(model: str, checkpoint: str, store: str, settings: str, rank: int, world_size: int, stop_after: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    backbone = StableDiffusion.from_folder(Path(model))
    lora = LoraConfig(rank=2)
    config = small_config().model_copy(update=json.loads(settings))
    engine = open_engine(backbone, config=config, lora=lora, world_size=world_size)

    def report(metrics: StepMetrics) -> None:
        if metrics.step + 1 == stop_after < config.steps:
            raise StopError

    try:
        train_expert(
            backbone,
            make_preferences(backbone),
            config=config,
            lora=lora,
            run_seed=5,
            expert_name="hate",
            engine=engine,
            checkpoint=open_location(checkpoint),
            report=report,
            rank=rank,
            world_size=world_size,
        )
    except StopError:
        pass
    finally:
        engine.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:5], *(int(argument) for argument in sys.argv[5:]))  # type: ignore[arg-type, misc]
