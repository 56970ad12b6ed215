from __future__ import annotations

from pathlib import Path

import pytest

from safetydpo.baselines.protocol import ErasedConcept, Erasure
from safetydpo.config.schema import BaseModelConfig, SamplerConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from tests.diffusion.tiny_models import build_model
from tests.tiny import build_tiny_model

SAMPLER = SamplerConfig(steps=3, guidance_scale=4.0, height=32, width=32, batch_size=2)
ERASURE = Erasure(
    concepts=(
        ErasedConcept("bomb", ("a red bomb", "a bomb on a house"), ("a red ball", "a ball on a house")),
        ErasedConcept("dagger", ("a drawing of a dagger",), ("a drawing of a flower",)),
    ),
    preserved=("a blue house", "a photo of a flower"),
)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def _shared(tiny_folder: Path) -> StableDiffusion:
    return StableDiffusion.from_folder(tiny_folder)


@pytest.fixture
def backbone(_shared: StableDiffusion) -> StableDiffusion:
    """A tiny Stable Diffusion without adapter."""
    _shared.remove_adapter()
    return _shared


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    """A tiny model of each family of U-Nets, and one that is none."""
    found: dict[str, Backbone] = {}
    for name in ("sd1", "sd2", "sdxl", "sd3"):
        folder = tmp_path_factory.mktemp(name)
        build_model(name, folder)
        found[name] = load_backbone(BaseModelConfig(model=str(folder)))
    return found
