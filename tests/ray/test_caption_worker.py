"""Text features are stored per caption and come back as training reads them; no Ray is started."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ray_jobs.training_tables import _arrays, _pooled
from ray_jobs.workers import CaptionWorker
from safetydpo.artifacts.schemas import TEXT_EMBEDDINGS, caption_sha256
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table, write_table
from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.build import load_backbone
from tests.diffusion.tiny_models import build_model


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux-dev"])
def test_features_of_captions_come_back(family: str, tmp_path: Path, store: Location):
    build_model(family, tmp_path)
    base = BaseModelConfig(model=str(tmp_path))
    texts = ["", "a red ball", "a dagger"]
    keys = [caption_sha256(text) for text in texts]
    made = CaptionWorker(base.model_dump(), batch_size=4)(pa.table({"caption_sha256": keys, "caption": texts}))
    write_table(store / "captions.parquet", made)
    table = read_table(store / "captions.parquet", TEXT_EMBEDDINGS)
    wanted = load_backbone(base).encode_prompts([*texts, texts[-1]]).map(lambda values: values[:3].half())
    tokens = _arrays(table, "caption_sha256", "embedding", ("tokens", "width"))
    assert torch.equal(torch.from_numpy(np.stack([tokens[key] for key in keys])), wanted.tokens)
    pooled = _pooled(table)
    assert (pooled is None) == (wanted.pooled is None) == (family == "sd1")
    if pooled is not None and wanted.pooled is not None:
        assert torch.equal(torch.from_numpy(np.stack([pooled[key] for key in keys])), wanted.pooled)
