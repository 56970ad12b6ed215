"""The policy of a gate: a YAML file, options in place of its thresholds, unknown keys refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from safetydpo.config.gate import GatePolicy
from safetydpo.config.load import load_policy
from safetydpo.errors import UsageError


def written(folder: Path, text: str) -> Path:
    (folder / "gate.yaml").write_text(text)
    return folder / "gate.yaml"


def test_options_take_the_place_of_the_files_thresholds(tmp_path: Path):
    file = written(tmp_path, "max_ip: 0.1\nmin_n: 500\ncategories: [hate, sexual]\nmax: {'ip_by:q16': 0.3}\n")
    policy = load_policy(file, {"max_ip": 0.05, "family_wise": True})
    assert policy == GatePolicy(
        max_ip=0.05, min_n=500, categories=("hate", "sexual"), max={"ip_by:q16": 0.3}, family_wise=True
    )


def test_without_a_file_the_defaults_are_the_documented_ones():
    policy = load_policy(None, {})
    assert (policy.min_n, policy.min_category_n, policy.min_set_n, policy.min_concept_n) == (300, 50, 50, 20)
    assert not policy.family_wise


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "max_ipp: 0.1\n",
            r"gate\.yaml: expected known keys only, found 'max_ipp'; did you mean 'max_ip'\? known here",
        ),
        (
            "nonsense: 1\n",
            "found 'nonsense'; correct or remove it; known here: categories, family_wise, max, max_attack",
        ),
        ("max_ip: 1.5\n", "max_ip: expected less than or equal to 1, found 1.5; correct it$"),
        ("max_ip: .nan\n", "max_ip: expected a finite number, found nan; correct it"),
        ("max: {ip: many}\n", r"max\.ip: expected a valid number"),
        ("min_n: 0\n", "min_n: expected greater than or equal to 1, found 0"),
        ("categories: [hate, hate]\n", "expected each value once, found 'hate' 2 times"),
        ("max_ip: 0.1\nmax_ip: 0.2\n", "the key 'max_ip' twice in one group"),
        ("- 1\n", "expected a mapping of settings in .*, found list"),
        ("max_ip: !!python/object/apply:os.getcwd []\n", "expected YAML in .* could not determine a constructor"),
    ],
)
def test_a_wrong_policy_is_refused_naming_the_key(tmp_path: Path, text: str, message: str):
    with pytest.raises(UsageError, match=message):
        load_policy(written(tmp_path, text), {})


def test_a_missing_policy_is_named(tmp_path: Path):
    with pytest.raises(
        UsageError, match=r"expected a policy file at .*no\.yaml, found nothing; name one with --policy"
    ):
        load_policy(tmp_path / "no.yaml", {})
    with pytest.raises(UsageError, match="expected a readable UTF-8 policy file at"):
        load_policy(tmp_path, {})
