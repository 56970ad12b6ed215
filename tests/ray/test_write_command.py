"""Options and places of `safetydpo prompts write` that do not fit: one line each. Whole runs: test_write_prompts.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray.commands import Command, Seen

CONCEPTS = Path(__file__).resolve().parents[2] / "configs" / "concepts-example.yaml"
USAGE = 2


def write(command: Command, out: str, *more: str) -> Seen:
    return command.raw("prompts", "write", str(CONCEPTS), "--out", out, *more)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "expected --model with --writer endpoint, found none: add it"),
        (("--model", "m"), "expected --base-url with --writer endpoint, found none"),
        (("--writer", "transformers"), "expected --model with --writer transformers, found none"),
        (("--writer", "templates", "--model", "m"), "found --model, which belongs to endpoint: remove it or choose"),
        (
            ("--model", "m", "--base-url", "http://h/v1", "--api-key-env", "NO_SUCH_KEY"),
            "expected a key in the environment variable NO_SUCH_KEY (--api-key-env), found none",
        ),
        (
            ("--model", "m", "--base-url", "http://h/v1?key=x"),
            "expected a base URL without a user name, password, query",
        ),
        (("--writer", "templates", "--max-requests", "1"), "expected room for 4 pairs per concept, found at most 1"),
    ],
)
def test_options_that_do_not_fit(command: Command, tmp_path: Path, options: tuple[str, ...], told: str):
    counts = ("--per-concept", "4", "--per-request", "2")
    write(command, str(tmp_path / "out"), *counts, *options).assert_one_line(told, code=USAGE)


def test_places_that_do_not_fit(command: Command, tmp_path: Path):
    templates = ("--writer", "templates")
    write(command, "s3://bucket/x", *templates).assert_one_line("expected --journal with a local folder", code=USAGE)
    (tmp_path / "file").write_text("x")
    write(command, str(tmp_path / "file"), *templates).assert_one_line("expected a folder or nothing at", code=USAGE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "prompt_pairs.parquet").write_bytes(b"mine")
    write(command, str(tmp_path / "other"), *templates).assert_one_line("found prompts without their", code=USAGE)
    assert (tmp_path / "other" / "prompt_pairs.parquet").read_bytes() == b"mine"
