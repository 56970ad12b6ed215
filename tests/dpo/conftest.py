from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData
from tests.dpo.preferences import make_preferences, small_config
from tests.tiny import build_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_dpo")
    build_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def shared_backbone(tiny_folder: Path) -> StableDiffusion:
    return StableDiffusion.from_folder(tiny_folder)


@pytest.fixture
def backbone(shared_backbone: StableDiffusion) -> Iterator[StableDiffusion]:
    yield shared_backbone
    shared_backbone.remove_adapter()


@pytest.fixture(scope="session")
def make_data(shared_backbone: StableDiffusion) -> Callable[..., PreferenceData]:
    """Return a maker of preferences with random latents and real text features."""

    def make(*args: int, **settings: Any) -> PreferenceData:
        return make_preferences(shared_backbone, *args, **settings)

    return make


@pytest.fixture
def config() -> DpoConfig:
    return small_config()


@pytest.fixture
def lora() -> LoraConfig:
    return LoraConfig(rank=2)


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A gloo group of this one process, as Ray Train makes it for one worker."""
    import torch.distributed as dist

    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
