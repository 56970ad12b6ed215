"""The same as `test_fuzz.py`, with 10,000 files in all."""

from __future__ import annotations

import pytest

from tests.security.fuzzed_readers import NAMES
from tests.security.test_fuzz import run_fuzz

pytestmark = pytest.mark.slow

FILES = 10_000


@pytest.mark.parametrize("name", NAMES)
def test_no_damage_is_more_than_an_error(name: str, tmp_path_factory: pytest.TempPathFactory):
    run_fuzz(name, tmp_path_factory.mktemp("fuzz"), examples=-(-FILES // len(NAMES)))
