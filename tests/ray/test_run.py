from __future__ import annotations

from pathlib import Path

import pytest

from ray_jobs.run import config_for_workers
from safetydpo.config.load import identity_of, load_config


def test_local_models_have_absolute_paths_for_workers_and_their_names_otherwise(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder below the working folder, a hub id that is no folder, shipped models, and nothing."""
    for name in ("models/base", "clip"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    base = "identity.base={model: models/base, vae: someone/vae}"
    config = load_config(configs / "smoke.yaml", [base, "identity.dpo.validation={every_steps: 2, clip: clip}"])
    found = config_for_workers(config).identity
    assert (found.base.model, found.base.vae, found.base.config) == (f"{tmp_path}/models/base", "someone/vae", None)
    assert found.dpo.validation.clip == f"{tmp_path}/clip"
    assert config.identity.dpo.validation.clip == "clip", "the identity stays as it was written"
    shipped = load_config(configs / "smoke.yaml", ["identity.dpo.validation={every_steps: 2, clip: demo}"])
    assert identity_of(config_for_workers(shipped)) == identity_of(shipped)
    plain = load_config(configs / "sd15.yaml")
    assert identity_of(config_for_workers(plain)) == identity_of(plain)
