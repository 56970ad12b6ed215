"""Damaged and hostile files, a few dozen for every reader: one clean line, or a correct result; never anything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.security.fuzzed_readers import NAMES, by_name
from tests.security.limits import assert_clean, bounded
from tests.security.mutations import damaged

EXAMPLES = 24


def test_the_list_of_names_is_whole():
    assert tuple(by_name()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_valid_file_is_read(name: str, tmp_path: Path):
    """Or every refusal below would be worth nothing; what a seed does not give is said here."""
    reader = by_name()[name]
    for number, seed in enumerate(reader.seeds):
        assert_clean(reader, tmp_path / str(number), seed, may_fail=name in ("lease", "run_identity", "candidate"))


@pytest.mark.parametrize("name", NAMES)
def test_no_damage_is_more_than_an_error(name: str, tmp_path_factory: pytest.TempPathFactory):
    run_fuzz(name, tmp_path_factory.mktemp("fuzz"), examples=EXAMPLES)


def run_fuzz(name: str, folder: Path, *, examples: int) -> None:
    """Call a reader with so many variants of its valid files; the draws are the same in every run."""
    reader = by_name()[name]
    with bounded():

        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def check(data: st.DataObject) -> None:
            seed = data.draw(st.sampled_from(reader.seeds))
            assert_clean(reader, folder, data.draw(damaged(seed, reader.kind)))

        check()
