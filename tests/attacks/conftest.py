from __future__ import annotations

import pytest

from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.build import load_backbone
from tests.tiny import build_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny real model; its words are those of `tests.tiny` and single letters."""
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_model(folder)
    return load_backbone(BaseModelConfig(model=str(folder)))


@pytest.fixture(scope="session")
def demo() -> Backbone:
    """The base model that ships with the project."""
    return load_backbone(BaseModelConfig())
