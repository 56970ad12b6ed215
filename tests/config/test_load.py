from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.config.load import identity_of, load_config, parse_config
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_file_then_overrides_in_order(write):
    path = write("name: mine\nidentity:\n  dpo: {steps: 50, warmup_steps: 3}\n")
    config = load_config(path, ["identity.dpo.steps=60", "identity.dpo.steps=70", "execution.num_workers=1"])
    assert (config.name, config.identity.dpo.steps, config.identity.dpo.warmup_steps) == ("mine", 70, 3)
    assert config.execution.num_workers == 1
    assert config.identity.lora == Config().identity.lora


def test_an_override_may_name_a_group_that_the_file_lacks(write):
    config = load_config(write("name: mine\n"), ["identity.search.trials=3", "identity.evaluation.seeds=[0, 1]"])
    assert (config.identity.search.trials, config.identity.evaluation.seeds) == (3, (0, 1))


def test_run_dir_and_store_have_short_paths(write):
    config = load_config(write("name: mine\n"), ["run_dir=elsewhere/x=1", "store=s3://bucket/pool"])
    assert (config.execution.run_dir, config.execution.store) == ("elsewhere/x=1", "s3://bucket/pool")


def test_numbers_written_as_yaml_leaves_them():
    """YAML 1.1 reads 2e-3 (no dot) as text; the setting is a number all the same."""
    assert yaml.safe_load("2e-3") == "2e-3"
    assert (
        parse_config({"identity": {"dpo": {"learning_rate": "2e-3"}}}, source="x").identity.dpo.learning_rate == 0.002
    )


def test_identity_is_plain_json_and_leaves_execution_out(write):
    one = load_config(write("name: a\n"), ["execution.num_workers=7", "identity.dpo.beta=100"])
    two = load_config(write("name: b\n"), ["store=elsewhere", "identity.dpo.beta=100.0"])
    assert identity_of(one) == identity_of(two)
    assert json.loads(json.dumps(identity_of(one))) == identity_of(one)
    # A group that came later is left out at its default (`added_field`), like a single setting.
    expected = {name for name, field in type(one.identity).model_fields.items() if field.exclude_if is None}
    assert set(identity_of(one)) == expected
    assert set(type(one.identity).model_fields) - expected == {"attack_search"}


@given(st.sampled_from([("seed", 1), ("dpo", {"steps": 99}), ("sampler", {"batch_size": 3}), ("lora", {"rank": 2})]))
def test_every_identity_setting_changes_the_identity(change: tuple[str, object]):
    assert identity_of(parse_config({"identity": dict([change])}, source="x")) != identity_of(Config())


def test_config_survives_a_round_trip_through_yaml(write):
    config = Config.model_validate({"name": "x", "identity": {"prompts": {"categories": ["violence"]}}})
    assert load_config(write(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "identity: {dpo: {stepz: 3}}",
            r"run\.yaml: expected known keys only, found 'identity\.dpo\.stepz'; "
            r"did you mean 'identity\.dpo\.steps'\? known here: .*beta, .*, steps,",
        ),
        ("nome: x", r"found 'nome'; correct or remove it; known here: .*execution, identity, merge_evidence, name$"),
        ("rank: 5", r"found 'rank'; did you mean 'identity\.lora\.rank' or 'identity\.merge\.distill\.rank'\?"),
        ("name: x\nname: y", r"found: the key 'name' twice in one group in .*line 2"),
        ("identity: {seed: 1, dpo: {beta: 1}, seed: 2}", "found: the key 'seed' twice in one group"),
        (
            "identity: {dpo: {steps: many}}",
            r"identity\.dpo\.steps: expected a valid integer.*, found 'many'; "
            r"correct it in the file or by identity\.dpo\.steps=VALUE$",
        ),
        ("identity: 3", "identity: expected a group of settings, found 3;"),
        ("name: A b", r"name: expected a text that matches '.*', found 'A b';"),
        (
            "identity: {dpo: {steps: 5}}",
            r"run\.yaml: identity\.dpo\.warmup_steps \(10\) must be below identity\.dpo\.steps \(5\); "
            r"correct one of them in the file or by its key\.path=VALUE$",
        ),
        (
            "identity: {merge: {distill: {strategy: single, processes: 2}}}",
            r"run\.yaml: identity\.merge\.distill: strategy 'single' trains .* found processes 2; correct one of",
        ),
        ("identity: {evaluation: {seeds: [1, 1]}}", r"found 1 2 times; .* by identity\.evaluation\.seeds=VALUE$"),
        (
            "identity: {prompts: {categories: [hate, nope]}}",
            r"categories\.1: .*, found 'nope'; .* by identity\.prompts\.categories=VALUE$",
        ),
        ("- a\n- b\n", r"expected a mapping of settings in .*run\.yaml, found list"),
        ("", r"expected a mapping of settings in .*run\.yaml, found NoneType"),
        ("name: [x", r"expected YAML in .*run\.yaml, found: while parsing"),
        ("name: !!python/object/apply:os.getcwd []", r"expected YAML in .*run\.yaml, found: could not determine"),
    ],
)
def test_bad_files(write, text: str, message: str):
    with pytest.raises(UsageError, match=message) as caught:
        load_config(write(text))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_missing_file(tmp_path: Path):
    with pytest.raises(UsageError, match=r"expected a config file at .*no\.yaml, found nothing; shipped ones are in"):
        load_config(tmp_path / "no.yaml")


def test_a_folder_is_no_config(tmp_path: Path):
    with pytest.raises(UsageError, match="expected a readable UTF-8 config file at .*, found: .*Is a directory"):
        load_config(tmp_path)


def test_text_in_another_encoding(tmp_path: Path):
    (tmp_path / "run.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UsageError, match="expected a readable UTF-8 config file at .*, found: 'utf-8' codec"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("identity.dpo.steps", "expected key.path=value, found 'identity.dpo.steps', for example"),
        ("=3", "expected key.path=value, found '=3'"),
        ("name.first=x", "expected a path of settings, found 'name.first=x': 'name' is a value, not a group"),
        ("identity.dpo.steps=[1", r"expected a YAML value in 'identity\.dpo\.steps=\[1', found: while parsing"),
        ("identity.dpo.stepz=1", r"found 'identity\.dpo\.stepz'; did you mean 'identity\.dpo\.steps'\?"),
        ("seed=1", r"found 'seed'; did you mean 'identity\.seed'\?"),
        ("dpo.steps=1", r"found 'dpo'; did you mean 'identity\.dpo'\?"),
        ("identity..steps=1", "expected known keys only, found 'identity.'"),
    ],
)
def test_bad_overrides(write, override: str, message: str):
    with pytest.raises(UsageError, match=message):
        load_config(write("name: x\n"), [override])
