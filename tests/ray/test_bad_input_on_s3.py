"""Places on S3 that are not there, through the real command: one line, exit code, no worker is started."""

from __future__ import annotations

import pytest
import ray

from safetydpo.artifacts.storage import Location
from tests.ray.commands import Command


@pytest.fixture(autouse=True)
def _no_ray_is_started():
    before = ray.is_initialized()
    yield
    assert ray.is_initialized() == before


@pytest.mark.parametrize(
    ("setting", "stage"),
    [
        ("store", ["pairs"]),
        ("run_dir", ["pairs"]),
        ("identity.prompts.source", ["pairs"]),
        ("store", ["export-pairs", "--out", "out"]),
    ],
)
def test_a_bucket_that_is_not_there(command: Command, s3_store: Location, setting: str, stage: list[str]):
    seen = command(*stage, f"{setting}=s3://no-such-bucket/x")
    seen.assert_one_line("expected to list s3://no-such-bucket/x", "NO_SUCH_BUCKET", "create the bucket", code=1)


def test_wrong_credentials(command: Command, s3_store: Location, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-5511")
    seen = command("pairs", f"store=s3://{s3_store.path}")
    seen.assert_one_line("SIGNATURE_DOES_NOT_MATCH", "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", code=1)
    assert "wrong-secret-5511" not in seen.err


def test_a_folder_of_prompts_that_is_not_there(command: Command, s3_store: Location):
    command("pairs", f"identity.prompts.source=s3://{s3_store.path}/prompts").assert_one_line(
        f"expected a folder of prompts at s3://{s3_store.path}/prompts (identity.prompts.source), found nothing: name",
        code=2,
    )
    assert s3_store.list() == []
