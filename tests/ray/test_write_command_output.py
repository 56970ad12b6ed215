"""What `safetydpo prompts write` prints at its end; whole runs are in `test_write_prompts`."""

from __future__ import annotations

import pytest

from ray_jobs.write_command import _print_record
from safetydpo.artifacts.records import Record


def test_what_looks_like_markup_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]):
    names = ("pairs", "held_out_pairs", "concepts", "requests", "retries", "prompt_tokens", "completion_tokens")
    counts = dict.fromkeys([*names, "replies_without_token_counts"], 0)
    details = {"rejects": {"[/odd]": 1}, "per_concept": [{"concept": "[/raised]", "pairs": 2, "short": True}]}
    _print_record(Record("prompts", "n", "h", 1, {}, {}, "f", counts=counts, details=details), out="/tmp/[/x]")
    seen = capsys.readouterr().out
    assert "concepts: /tmp/[/x]\n" in seen
    assert "not kept: [/odd] 1" in seen
    assert "concepts: [/raised] (2);" in seen
