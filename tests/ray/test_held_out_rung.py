"""Questions about stored pairs, with the demo model and an adapter, in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ray_jobs import held_out_rung
from ray_jobs.expert_plan import plan_experts
from ray_jobs.held_out_rung import open_questions
from ray_jobs.run import Run
from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.records import read_record
from safetydpo.artifacts.storage import Location
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.rungs import HeldOutRung
from safetydpo.diffusion.build import load_backbone
from safetydpo.dpo.engine import lora_signature
from safetydpo.errors import SafetyDPOError
from safetydpo.prompts.sets import Prompt
from tests.ray.closed_artifacts import close_training_data, open_run
from tests.ray.smoke_place import SMOKE

VALIDATED = "identity.dpo.validation={every_steps: 5, held_out_rate: 0.25}"
PROMPTS = [
    Prompt(text, kind, "validation", text.partition(" on ")[0], "", (), "white")
    for kind, text in (("neutral", "dog on white"), ("neighbour", "dagger on white"), ("neutral", "apple on white"))
]
RUNG = HeldOutRung(num_pairs=6, benign_pictures=3, draws=2)


@pytest.fixture(scope="module")
def backbone() -> Any:
    return load_backbone(open_run(SMOKE, []).config.identity.base)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Location]:
    place = tmp_path_factory.mktemp("closed")
    run = open_run(SMOKE, [f"store={place}/store", f"run_dir={place}/run", VALIDATED])
    _, folder = close_training_data(run)
    return run, folder


def install(backbone: Any, run: Run, size: float) -> None:
    generator, lora = torch.Generator().manual_seed(0), run.config.identity.lora
    layers = {
        name: LoraLayer(
            torch.randn(lora.rank, d_in, generator=generator), size * torch.randn(d_out, lora.rank, generator=generator)
        )
        for name, (d_in, d_out) in backbone.named_linear_layers(lora.layer_targets)
    }
    backbone.swap_adapter(lora_signature(lora), layers)


def test_only_pairs_that_no_expert_trained_on_are_asked_about(closed: Any, backbone: Any) -> None:
    """Of 8 pairs a category 2 are held out: 2 experts, 4 pairs at most (one of two categories may be trained on)."""
    run, folder = closed
    found = open_questions(run, RUNG, folder, backbone, prompts=PROMPTS)
    assert 2 * 2 <= len(found.questions.unsafe) <= 4 * 2
    assert len(found.questions.unsafe) == len(found.questions.safe) == len(found.questions.safe_own)
    assert len(found.questions.benign) == 3 * 2
    everything = open_questions(run, RUNG.model_copy(update={"pairs": "all"}), folder, backbone, prompts=PROMPTS)
    assert len(everything.questions.unsafe) == 6 * 2


def test_pair_and_its_partner_share_noise_timestep_and_caption(closed: Any, backbone: Any) -> None:
    asked = open_questions(closed[0], RUNG, closed[1], backbone, prompts=PROMPTS).questions
    assert torch.equal(asked.unsafe.timesteps, asked.safe.timesteps)
    assert torch.equal(asked.unsafe.condition.tokens, asked.safe.condition.tokens)
    assert torch.equal(asked.unsafe.target, asked.safe.target)
    assert not torch.equal(asked.unsafe.noisy, asked.safe.noisy)
    assert not torch.equal(asked.safe_own.condition.tokens, asked.safe.condition.tokens)


def test_the_base_has_rises_of_zero_and_an_adapter_the_same_numbers_each_time(closed: Any, backbone: Any) -> None:
    run, folder = closed
    found = open_questions(run, RUNG, folder, backbone, prompts=PROMPTS)
    numbers = found.numbers(backbone)
    assert {name: numbers[name] for name in ("margin", "safe_fall", "safe_rise", "benign_rise")} == dict.fromkeys(
        ("margin", "safe_fall", "safe_rise", "benign_rise"), 0.0
    )
    install(backbone, run, 0.05)
    first = found.numbers(backbone)
    assert first["benign_rise"] > 0
    assert first["neutral_shift"] > 0 < first["neighbour_shift"]
    install(backbone, run, 0.1)
    assert found.numbers(backbone)["benign_rise"] > first["benign_rise"]
    again = open_questions(run, RUNG, folder, backbone, prompts=PROMPTS)
    install(backbone, run, 0.05)
    assert again.numbers(backbone) == first == found.numbers(backbone)
    backbone.remove_adapter()


def test_prompts_are_asked_about_on_noise_of_their_own(closed: Any, backbone: Any) -> None:
    """Two neutral prompts and one neighbour at 0.8 x 999; a prompt's noise does not depend on those beside it."""
    asked = open_questions(closed[0], RUNG, closed[1], backbone, prompts=PROMPTS).questions
    assert (len(asked.neutral), len(asked.neighbour)) == (2, 1)
    assert {*asked.neutral.timesteps.tolist(), *asked.neighbour.timesteps.tolist()} == {799}
    assert not torch.equal(asked.neutral.target, asked.neutral_plain)
    alone = open_questions(closed[0], RUNG, closed[1], backbone, prompts=PROMPTS[1:]).questions
    assert torch.equal(alone.neutral.noisy, asked.neutral.noisy[1:])


def test_a_range_of_timesteps_is_kept(closed: Any, backbone: Any) -> None:
    rung = RUNG.model_copy(update={"timestep_range": (900, 950)})
    asked = open_questions(closed[0], rung, closed[1], backbone, prompts=PROMPTS).questions
    assert 900 <= int(asked.benign.timesteps.min()) <= int(asked.benign.timesteps.max()) <= 950


def test_nothing_to_ask_about_is_refused(closed: Any, backbone: Any, tmp_path: Path) -> None:
    """Two experts of the same pairs, with other draw seeds each: what one holds out the other trains on."""
    run, folder = closed
    units = [unit for unit in plan_experts(run, read_record(folder), folder) if unit.name != ALL_SINGLE]
    seeds = [replace(units[0], dpo=units[0].dpo.model_copy(update={"draw_seed": seed})) for seed in range(20)]
    with (
        patch.object(held_out_rung, "plan_experts", lambda *_: seeds),
        pytest.raises(SafetyDPOError, match=r"pairs that no expert has trained on, found none of 8: raise"),
    ):
        open_questions(run, RUNG, folder, backbone, prompts=PROMPTS)
    bare = open_run(SMOKE, [f"store={tmp_path}/s", f"run_dir={tmp_path}/r", "identity.prompts.retention_prompts=0"])
    _, empty = close_training_data(bare)
    rung = RUNG.model_copy(update={"pairs": "all"})
    with pytest.raises(SafetyDPOError, match=r"expected benign pictures .* found none: raise identity\.prompts\.ret"):
        open_questions(bare, rung, empty, backbone, prompts=PROMPTS)
