from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from safetydpo.artifacts.layout import demo_weights
from tests.diffusion.models import Model, load_model
from tests.tiny import build_tiny_model

DEMO = demo_weights() / "base"
MODELS = ["tiny", *(["demo"] if (DEMO / "model_index.json").is_file() else [])]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_model(folder)
    return folder


@pytest.fixture
def copy_of_tiny(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model's files, to be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.fixture(scope="session", params=MODELS)
def _shared_model(request: pytest.FixtureRequest, tiny_folder: Path) -> Model:
    return load_model(tiny_folder if request.param == "tiny" else DEMO)


@pytest.fixture
def model(_shared_model: Model) -> Model:
    """A base model without adapter; a test may install one, the next test gets the base again."""
    _shared_model.backbone.remove_adapter()
    return _shared_model


@pytest.fixture(scope="session")
def load_pipeline() -> Callable[[Path], StableDiffusionPipeline]:
    """Load a folder with plain diffusers, set to the solver that we sample with."""

    def load(folder: Path) -> StableDiffusionPipeline:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load
