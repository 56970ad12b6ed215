"""Settings of the measurement of merges: what they refuse, and that every method has as many candidates."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from safetydpo.config.load import identity_of
from safetydpo.config.merge_evidence import MergeEvidenceConfig
from safetydpo.config.schema import Config


def test_methods_without_a_density_have_as_many_candidates() -> None:
    with pytest.raises(ValidationError, match="expected as many scale_factors as densities, found 3 and 2"):
        MergeEvidenceConfig(densities=(0.1, 0.3))
    assert MergeEvidenceConfig(densities=(0.1,), scale_factors=(1.0,)).validated == 3


def test_no_more_are_validated_than_there_are() -> None:
    with pytest.raises(ValidationError, match=r"validated \(7\) must not be above the number of candidates \(6\)"):
        MergeEvidenceConfig(densities=(0.1,), scale_factors=(1.0,), validated=7)


def test_the_grid_has_six_methods_at_most() -> None:
    with pytest.raises(ValidationError, match="expected at most 6 methods in the grid, found 7"):
        MergeEvidenceConfig(methods=("sum", "average", "linear", "svd", "ties", "dare", "iso"))


def test_it_is_no_part_of_a_runs_identity() -> None:
    changed = Config.model_validate({"merge_evidence": {"seeds": [5], "retention": 0.8}})
    assert identity_of(changed) == identity_of(Config())
