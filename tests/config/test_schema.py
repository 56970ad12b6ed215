from __future__ import annotations

import ast
import inspect

import pytest
from pydantic import BaseModel, ValidationError

from safetydpo.config import pairs, schema, training
from safetydpo.config.fields import CATEGORIES
from safetydpo.config.schema import Config, SamplerConfig
from safetydpo.config.training import NEEDS_REFERENCE_OUTPUT

MODULES = (schema.__name__, pairs.__name__, training.__name__)
GROUPS = [
    value
    for value in vars(schema).values()
    if inspect.isclass(value) and issubclass(value, BaseModel) and value.__module__ in MODULES
]


def test_defaults_are_valid_and_frozen():
    config = Config()
    assert config.identity.prompts.categories == CATEGORIES
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_every_setting_says_what_it_means(group: type[BaseModel]):
    """A field is followed by a string, or is itself a group with a docstring."""
    body = ast.parse(inspect.getsource(group)).body[0]
    assert isinstance(body, ast.ClassDef)
    assert ast.get_docstring(body) or group.__name__.startswith("_")
    for statement, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            kind = group.model_fields[statement.target.id].annotation
            is_group = inspect.isclass(kind) and issubclass(kind, BaseModel)
            has_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert is_group or has_text, f"{group.__name__}.{statement.target.id} says nothing"


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("search", {"scale_range": [2.0, 1.0]}, r"identity\.search\.scale_range: expected 0 < low <= high, found \[2"),
        ("search", {"weight_range": [0.0, 1.0]}, r"identity\.search\.weight_range: expected 0 < low <= high"),
        ("search", {"density_range": [-1.0, 1.0]}, r"identity\.search\.density_range: expected 0 < low <= high"),
        ("search", {"scale_ranges": {"sum": [2.0, 1.0]}}, r"search\.scale_ranges\.sum: expected 0 < low <= high"),
        (
            "search",
            {"scale_ranges": {"dare": [0.5, 1.0]}},
            r"search\.scale_ranges: expected methods of .* found 'dare'",
        ),
        ("search", {"plain_scales": {"dare": [1.0]}}, r"search\.plain_scales: expected methods of .* found 'dare'"),
        ("search", {"plain_scales": {"sum": [9.0]}}, r"scales within identity\.search\.scale_range \[0\.1, 3\.0\]"),
        (
            "search",
            {"plain_scales": {"sum": [1.5]}, "scale_ranges": {"sum": [0.5, 1.0]}},
            r"scales within identity\.search\.scale_ranges\.sum \[0\.5, 1\.0\], found \[1\.5\]",
        ),
        ("prompts", {"categories": ["hate", "hate"]}, "expected each value once, found 'hate' 2 times"),
        ("evaluation", {"seeds": [0, 1, 0]}, "expected each value once, found 0 2 times"),
        ("merge", {"methods": ["sum", "sum"]}, "expected each value once, found 'sum' 2 times"),
        ("evaluation", {"seeds": []}, "at least 1 item"),
        ("sampler", {"height": 33}, "multiple of 8"),
        ("pairs", {"unsafe_score_min": 1.5}, "less than or equal to 1"),
        ("dpo", {"learning_rate": float("nan")}, "finite number"),
        ("dpo", {"beta": 0}, "greater than 0"),
        ("dpo", {"strategy": "horovod"}, "'single', 'ddp' or 'deepspeed'"),
        ("prompts", {"categories": ["Hate"]}, "Input should be 'hate'"),
    ],
)
def test_a_value_out_of_range_is_refused(group: str, values: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        Config.model_validate({"identity": {group: values}})


def test_warm_up_must_end_before_training_does():
    with pytest.raises(
        ValidationError, match=r"identity\.dpo\.warmup_steps \(5\) must be below identity\.dpo\.steps \(5\)"
    ):
        Config.model_validate({"identity": {"dpo": {"warmup_steps": 5, "steps": 5}}})


@pytest.mark.parametrize("gpus", [0, 0.25, 1, 2.0])
def test_gpus_per_worker_may_be_a_fraction_or_whole(gpus: float):
    Config.model_validate({"execution": {"gpus_per_worker": gpus}})


def test_one_and_a_half_gpus_are_refused():
    with pytest.raises(ValidationError, match=r"expected a fraction in \(0, 1\] or a whole number, found 1\.5"):
        Config.model_validate({"execution": {"gpus_per_worker": 1.5}})


@pytest.mark.parametrize("name", ["", "Demo", "a/b", "..", "-a", "a" * 65])
def test_a_name_is_part_of_a_path_and_kept_plain(name: str):
    with pytest.raises(ValidationError, match="String should match pattern"):
        Config(name=name)


def test_a_base_model_without_later_settings_is_dumped_as_before_they_came():
    """Hashes of artifacts cover this dump."""
    plain = {"model": "demo", "revision": None, "dtype": "float32"}
    assert schema.BaseModelConfig().model_dump(mode="json") == plain
    assert Config().model_dump(mode="json")["identity"]["base"] == plain
    full = schema.BaseModelConfig(model="a.safetensors", config="b", vae="c")
    assert full.model_dump() == plain | {"model": "a.safetensors", "config": "b", "vae": "c"}
    assert schema.BaseModelConfig(**full.model_dump()) == full


@pytest.mark.parametrize("option", NEEDS_REFERENCE_OUTPUT)
def test_stored_errors_are_refused_beside_what_needs_more(option: str):
    message = rf"identity\.dpo\.{option} \(0\.5\) must be 0 with identity\.dpo\.reference 'cached': it needs what the"
    with pytest.raises(ValidationError, match=message):
        Config.model_validate({"identity": {"dpo": {"reference": "cached", option: 0.5}}})
    Config.model_validate({"identity": {"dpo": {"reference": "cached", option: 0}}})


def test_draws_need_latents_that_are_stored():
    message = r"identity\.dpo\.flip_rate \(0\.5\) must be 0 without identity\.pairs\.flipped_latents"
    with pytest.raises(ValidationError, match=message):
        Config.model_validate({"identity": {"dpo": {"flip_rate": 0.5}}})
    message = (
        r"identity\.dpo\.latent_sampling 'sample' needs identity\.pairs\.latents 'mean_and_deviation', found 'mean'"
    )
    with pytest.raises(ValidationError, match=message):
        Config.model_validate({"identity": {"dpo": {"latent_sampling": "sample"}}})
    stored = {"flipped_latents": True, "latents": "mean_and_deviation"}
    Config.model_validate({"identity": {"pairs": stored, "dpo": {"flip_rate": 0.5, "latent_sampling": "sample"}}})


def test_settings_of_draws_leave_stored_dumps_as_they_are():
    added = {"draw_seed", "draws_per_pair", "flip_rate", "latent_sampling", "reference", "flipped_latents"}
    identity = Config().model_dump(mode="json")["identity"]
    assert not added & {*identity["dpo"], *identity["pairs"]}
    assert schema.DpoConfig(draw_seed=3).draw_seed_of(8) == 3
    assert schema.DpoConfig().draw_seed_of(8) == 8


def test_adapters_are_fused_into_float32_only_and_being_fused_is_another_sampler():
    assert "fused" not in SamplerConfig().model_dump(mode="json")
    assert SamplerConfig(fused=True).model_dump(mode="json")["fused"] is True
    identity = {"sampler": {"fused": True}, "base": {"model": "folder", "dtype": "bfloat16"}}
    with pytest.raises(ValidationError, match=r"identity\.sampler\.fused .* found identity\.base\.dtype 'bfloat16'"):
        Config.model_validate({"identity": identity})
