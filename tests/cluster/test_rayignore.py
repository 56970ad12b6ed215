"""What travels with `--working-dir .`: code, configs and the demo's weights, by Ray's own reading of .rayignore."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MAX_BYTES = 40_000_000
"""Ray refuses 512 MiB; a submission should take seconds."""


@pytest.fixture(scope="module")
def travelling(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """{path: bytes} of what Ray packs of a clone: the tracked files, and what somebody may have left beside them."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    root = Path(__file__).resolve().parents[2]
    clone, package = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("package") / "package.zip"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, clone / name)
    for name in ("runs/store/big.bin", "dist/x.whl", ".env", "auth_token", "keys/id_ed25519", "prompts/mine.yaml"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("x")
    create_package(str(clone), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    import zipfile

    with zipfile.ZipFile(package) as archive:
        return {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}


def test_a_job_has_what_it_needs(travelling: dict[str, int]):
    for name in (
        "ray_jobs/pipeline.py",
        "safetydpo/config/schema.py",
        "safetydpo/demo/weights/base/model_index.json",
        "configs/smoke.yaml",
        "configs/sdxl.yaml",
        "prompts/mine.yaml",
    ):
        assert name in travelling


def test_the_rest_stays_at_home(travelling: dict[str, int]):
    for folder in ("tests/", "docs/", "benchmarks/", "runs/", "dist/", ".git/", "configs/cluster/"):
        assert not [name for name in travelling if name.startswith(folder)], folder
    assert not {".env", "auth_token", "keys/id_ed25519", "cluster.yaml", "README.md"} & set(travelling)
    assert sum(travelling.values()) < MAX_BYTES
