from __future__ import annotations

import pytest
from pydantic import ValidationError

from safetydpo.config.labels import check_selector, satisfies
from safetydpo.config.schema import ExecutionConfig

NODE = {"market-type": "spot", "ray.io/accelerator-type": "L4"}


@pytest.mark.parametrize(
    ("selector", "wanted"),
    [
        ({}, True),
        ({"market-type": "spot"}, True),
        ({"market-type": "on-demand"}, False),
        ({"market-type": "!spot"}, False),
        ({"market-type": "in(on-demand,spot)"}, True),
        ({"market-type": "!in(on-demand,spot)"}, False),
        ({"team": "a"}, False),
        ({"team": "!a"}, True),
        ({"team": "!in(a,b)"}, True),
        ({"market-type": "spot", "ray.io/accelerator-type": "A10"}, False),
    ],
    ids=lambda value: str(value),
)
def test_a_node_is_selected_as_ray_would(selector: dict[str, str], wanted: bool):
    """A label that is missing satisfies `!` only; all labels of a selector must be satisfied."""
    check_selector(selector)
    assert satisfies(NODE, selector) is wanted


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ({"team": "in(a, b)"}, "expected x, !x, in(x,y) or !in(x,y) for the label team, found 'in(a, b)'"),
        ({"team": ""}, "for the label team, found ''"),
        ({"a b": "x"}, "expected a node's label such as market-type or ray.io/node-group, found 'a b'"),
    ],
    ids=["space", "empty", "label"],
)
def test_what_ray_would_not_take_is_refused(selector: dict[str, str], message: str):
    with pytest.raises(ValueError) as refused:
        check_selector(selector)
    assert message in str(refused.value)
    with pytest.raises(ValidationError, match="execution.label_selector: expected"):
        ExecutionConfig(label_selector=selector)


def test_ray_itself_reads_selectors_the_same_way():
    """Ray's own check takes what ours takes, and refuses what it refuses."""
    validate = pytest.importorskip("ray._private.label_utils").validate_label_selector
    for value in ("spot", "!spot", "in(a,b)", "!in(a,b)"):
        assert validate({"market-type": value}) is None
    for value in ("in(a", "a b"):
        assert validate({"market-type": value}) is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gpus": 0.5}, "execution.max_gpus (0.5) must not be below 1, execution.gpus_per_worker"),
        ({"max_gpus": 2, "workers_per_expert": 4}, "must not be below 4"),
        ({"stage_max_gpus": {"evaluate": 0.25}}, "execution.stage_max_gpus.evaluate (0.25) must not be below 1"),
    ],
    ids=["run", "together", "stage"],
)
def test_a_cap_that_lets_nothing_run_is_refused(settings: dict[str, object], message: str):
    with pytest.raises(ValidationError) as refused:
        ExecutionConfig.model_validate({"gpus_per_worker": 1, **settings})
    assert message in str(refused.value)
