"""One process of a small DeepSpeed training over gloo; run by `test_deepspeed_engine.py` as a module."""

from __future__ import annotations

import sys
from pathlib import Path

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


def main(model: str, checkpoint: str, store: str, rank: int, world_size: int, stop_after: int, stage: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    backbone = StableDiffusion.from_folder(Path(model))
    lora = LoraConfig(rank=2)
    config = small_config().model_copy(update={"strategy": "deepspeed", "zero_stage": stage})
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
    main(*sys.argv[1:4], *(int(argument) for argument in sys.argv[4:]))  # type: ignore[arg-type, misc]
