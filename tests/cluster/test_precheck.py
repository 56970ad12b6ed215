"""The pre-check: the parts that need no Ray here, the rest on a local Ray with logical CPUs (slow)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ray_jobs import precheck
from ray_jobs.precheck import Answer, check_versions, explain_mismatch, try_folder, versions_here
from ray_jobs.precheck_token import check_token
from safetydpo.artifacts.storage import Location
from safetydpo.errors import UsageError


def test_versions_must_be_equal_everywhere():
    here = versions_here()
    assert set(here) == {"ray", "python", "safetydpo"}
    assert here["python"].count(".") == 1
    fine = Answer("10.0.0.1", here)
    check_versions([fine, Answer("10.0.0.2", here)], here)
    others = [fine, Answer("10.0.0.2", {**here, "ray": "2.59.0"}), Answer("10.0.0.3", {**here, "ray": "2.58.0"})]
    with pytest.raises(
        UsageError,
        match=rf"expected ray {here['ray']} on every node, .* found 2\.59\.0 on 10\.0\.0\.2 and on 1 more: install",
    ):
        check_versions(others, here)
    with pytest.raises(UsageError, match=r"expected python 3\.99 on every node, .* found \S+ on 10\.0\.0\.1: install"):
        check_versions([fine], {"python": "3.99"})
    with pytest.raises(UsageError, match="expected safetydpo 9 on every node, .* found none on 10.0.0.2"):
        check_versions([Answer("10.0.0.2", {"ray": "1"})], {"safetydpo": "9"})


def test_rays_own_refusal_of_other_versions_in_one_line():
    told = explain_mismatch(
        RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.11.7\nThis process"
        )
    )
    assert isinstance(told, UsageError)
    assert str(told).startswith("expected the cluster's versions of Ray and Python on this machine, found: Version mis")
    assert "\n" not in str(told)
    assert explain_mismatch(RuntimeError("something else")) is None


def test_a_node_uses_the_folder_that_the_driver_made(place: Location):
    (place / precheck.WRITTEN_BY_DRIVER).write_bytes(b"x")
    assert try_folder(place) == ""
    assert [child.name for child in place.list()] == [precheck.WRITTEN_BY_DRIVER]


def test_a_folder_that_is_not_shared(store: Location):
    assert try_folder(store).startswith(
        "what the driver has just written is not there; use an s3:// address or a folder"
    )


def test_a_folder_that_cannot_be_written(store: Location, monkeypatch: pytest.MonkeyPatch):
    """As a full disk, or a right to read only, would answer; root may write everywhere."""
    (store / precheck.WRITTEN_BY_DRIVER).write_bytes(b"x")

    def refuse(*_arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "fsync", refuse)
    assert "Permission denied" in try_folder(store)


@pytest.mark.parametrize(
    "environment", [{}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}]
)
def test_no_token_is_asked_for_or_it_is_there(environment: dict[str, str]):
    check_token(environment)


def test_a_token_file(tmp_path: Path):
    with pytest.raises(
        UsageError, match=rf"expected a token at {tmp_path}/\.ray/auth_token \(RAY_AUTH_MODE is token\), found none"
    ):
        check_token({"RAY_AUTH_MODE": "TOKEN", "HOME": str(tmp_path)})
    file = tmp_path / "token"
    file.write_text("")
    with pytest.raises(UsageError, match=f"expected a token at {file} .* found none: copy the cluster's there"):
        check_token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)})
    file.write_text("abc")
    check_token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)})
