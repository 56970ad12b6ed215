"""One of two processes of a small validated DeepSpeed training over gloo; run by `test_validation.py` as a module."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from safetydpo.config.training import LoraConfig
from safetydpo.config.validation import ValidationConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.engine import open_engine
from safetydpo.dpo.trainer import train_expert
from tests.dpo.preferences import make_preferences, small_config
from tests.dpo.validations import ScriptedRates, rates


def main(model: str, out: str, store: str, rank: int) -> None:
    """Process 1 finds its pictures a little less safe after 4 steps, as other kernels on another card might."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    lora, validation = LoraConfig(rank=2), ValidationConfig(every_steps=2, held_out_rate=0.3, patience=1)
    config = small_config().model_copy(update={"strategy": "deepspeed", "steps": 6, "validation": validation})
    backbone = StableDiffusion.from_folder(Path(model))
    engine = open_engine(backbone, config=config, lora=lora, world_size=2)
    script = {0: rates(0.9), 2: rates(0.5), 4: rates(0.5 + (1e-9 if rank else -1e-10)), 6: rates(0.5)}
    trained = train_expert(
        backbone,
        make_preferences(backbone),
        config=config,
        lora=lora,
        run_seed=5,
        expert_name="hate",
        engine=engine,
        sample_rates=ScriptedRates(script),
        rank=rank,
        world_size=2,
    )
    engine.close()
    Path(f"{out}-{rank}.json").write_text(json.dumps([asdict(one) for one in trained.validations]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))  # type: ignore[misc]
