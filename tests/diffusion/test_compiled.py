"""Pictures drawn by compiled blocks (about half a minute of a C++ compiler)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safetydpo.config.schema import BaseModelConfig, SamplerConfig
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.render import render


@pytest.mark.slow
@pytest.mark.long
def test_compiled_pictures_are_nearly_the_others(tiny_folder: Path) -> None:
    """In float32 at most 1 of 256 levels apart; equal when drawn again; and the network is left as it was."""
    backbone = load_backbone(BaseModelConfig(model=str(tiny_folder)))
    sampler = SamplerConfig(steps=3, batch_size=2)
    compiled = sampler.model_copy(update={"compiled": True})

    def draw(settings: SamplerConfig) -> torch.Tensor:
        return render(backbone, prompts=["a red ball", "a house"], seeds=[1, 2], sampler=settings).int()

    plain = draw(sampler)
    first = draw(compiled)
    assert int((first - plain).abs().max()) <= 1
    assert torch.equal(draw(compiled), first)
    assert torch.equal(draw(sampler), plain)
    assert not any("forward" in vars(module) for module in backbone.network.modules())


def test_compiled_is_another_sampler_and_left_out_when_off() -> None:
    assert "compiled" not in SamplerConfig().model_dump(mode="json")
    assert SamplerConfig(compiled=True).model_dump(mode="json")["compiled"] is True
