"""No setting of a config sounds like a secret, or a job could not set it; keys of known forms are found."""

from __future__ import annotations

import pytest

from ray_jobs.submit_plan import TRAVELLING
from ray_jobs.submit_secrets import holds_secret, is_secret_name
from safetydpo.config.load import _all_settings
from safetydpo.config.schema import Config


def test_settings_and_travelling_variables_are_no_secrets():
    assert [name for name in _all_settings(Config) if is_secret_name(name.rpartition(".")[2])] == []
    assert [name for name in TRAVELLING if is_secret_name(name)] == []


@pytest.mark.parametrize(
    "text",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "x=ASIAIOSFODNN7EXAMPLE",
        "hf_" + "x" * 34,
        "sk-" + "x" * 40,
        "ghp_" + "x" * 36,
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----",
        "postgres://me:word@host/db",
    ],
)
def test_keys_of_known_forms(text: str):
    assert holds_secret(text)


@pytest.mark.parametrize(
    "text", ["s3://bucket/store", "http://127.0.0.1:9000", "a:b@c", "hf_short", "task-force-of-many-people"]
)
def test_what_is_none(text: str):
    assert not holds_secret(text)
