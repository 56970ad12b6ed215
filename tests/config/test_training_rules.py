"""Settings that would fail late or do nothing are refused while the config is loaded, in one line."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.config.load import parse_config
from safetydpo.config.training import DpoConfig
from safetydpo.config.training_rules import check_workers
from safetydpo.errors import UsageError

FLOAT16 = {"base": {"dtype": "float16"}}


def parse(dpo: dict[str, Any], *, workers: int = 1, **identity: Any) -> DpoConfig:
    content = {"identity": {"dpo": dpo, **identity}, "execution": {"workers_per_expert": workers}}
    return parse_config(content, source="run.yaml").identity.dpo


@pytest.mark.parametrize(
    ("dpo", "workers", "message"),
    [
        (
            {"strategy": "single"},
            2,
            r"identity\.dpo\.strategy 'single' .*: expected execution\.workers_per_expert 1, found 2; use strategy",
        ),
        (
            {"pairs_per_step": 6},
            4,
            r"identity\.dpo\.pairs_per_step to be a multiple of execution\.workers_per_expert \(4\), .* found 6: ",
        ),
        (
            {"pairs_per_step": 8, "retention_weight": 1.0, "retention_per_step": 6},
            4,
            r"identity\.dpo\.retention_per_step to be a multiple of execution\.workers_per_expert \(4\), .* found 6: ",
        ),
        (
            # 12 pairs are 6 for each of two workers, which parts of 4 do not fill; one worker could have three parts.
            {"pairs_per_step": 12, "pairs_per_forward": 4},
            2,
            r"pairs_per_forward \(4\) to split .* execution\.workers_per_expert \(2\) .* found 6 pairs and 0 benign",
        ),
    ],
)
def test_workers_that_cannot_share_a_step_are_refused(dpo: dict[str, Any], workers: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(dpo, workers=workers)


@pytest.mark.parametrize(
    ("dpo", "workers"),
    [
        ({"strategy": "ddp", "pairs_per_step": 12, "pairs_per_forward": 3}, 2),
        # No fewer than a worker has: it takes them all at once.
        ({"pairs_per_step": 16, "pairs_per_forward": 16}, 4),
        ({"pairs_per_step": 16, "pairs_per_forward": 4, "retention_weight": 1.0, "retention_per_step": 8}, 2),
        # Without its weight the retention term has no rows.
        ({"pairs_per_step": 8, "retention_per_step": 6}, 4),
        ({"strategy": "single"}, 1),
    ],
)
def test_workers_that_can_share_a_step_are_taken(dpo: dict[str, Any], workers: int) -> None:
    assert parse(dpo, workers=workers).pairs_per_step


@given(
    st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    st.sampled_from([None, 1, 2, 3, 4, 6, 12]),
    st.integers(0, 12),
    st.integers(1, 4),
)
def test_the_rule_is_that_every_worker_has_equal_parts(pairs: int, at_once: int | None, benign: int, workers: int):
    """Against counting: deal the rows out as ranks take them, and cut each hand into parts."""
    dpo = DpoConfig(
        pairs_per_step=pairs, pairs_per_forward=at_once, retention_weight=float(benign > 0), retention_per_step=benign
    )
    hands = [(len(range(rank, pairs, workers)), len(range(rank, benign, workers))) for rank in range(workers)]
    fits = len(set(hands)) == 1 and hands[0][0] > 0
    if fits and at_once is not None and at_once < hands[0][0]:
        own, own_benign = hands[0]
        parts = len(range(0, own, at_once))
        fits = own == parts * at_once and any(own_benign == parts * share for share in range(benign + 1))
    if fits:
        check_workers(dpo, workers=workers)
    else:
        with pytest.raises(ValueError, match=r"to be a multiple of|to split"):
            check_workers(dpo, workers=workers)


@pytest.mark.parametrize("group", ["dpo", "distill"])
def test_a_float16_base_without_loss_scaling_is_refused(group: str) -> None:
    identity: dict[str, Any] = {"dpo": {"loss_scaling": "none"}}
    if group == "distill":
        identity = {"merge": {"distill": {"loss_scaling": "none"}}}
    with pytest.raises(
        UsageError,
        match=rf"{group}\.loss_scaling 'auto' or 'dynamic' with identity\.base\.dtype 'float16', found 'none', under",
    ):
        parse_config({"identity": {**identity, **FLOAT16}}, source="run.yaml")
    for dtype, scaling in product(("float32", "bfloat16"), ("none", "auto", "dynamic")):
        assert parse({"loss_scaling": scaling}, base={"dtype": dtype}).loss_scaling == scaling
    assert parse({"loss_scaling": "dynamic"}, **FLOAT16).loss_scaling == "dynamic"


@pytest.mark.parametrize(
    ("dpo", "message"),
    [
        (
            {"retention_weight": 2.0, "retention_per_step": 0},
            r"dpo\.retention_per_step of at least 1 with identity\.dpo\.retention_weight \(2\), found 0, under",
        ),
        (
            {"redirection_weight": 2.0, "captions": "safe"},
            r"identity\.dpo\.redirection_weight \(2\), found identity\.dpo\.captions 'safe', which leaves none: use",
        ),
        (
            {"redirection_weight": 2.0, "empty_caption_rate": 1.0},
            r"identity\.dpo\.redirection_weight \(2\), found identity\.dpo\.empty_caption_rate 1, which leaves none: u",
        ),
        (
            {"min_snr_gamma": 4.0},
            r"identity\.dpo\.error_weighting 'min_snr' with identity\.dpo\.min_snr_gamma \(4\), found 'native', under",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(dpo: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(dpo)


def test_retention_without_a_picture_to_retain_is_refused() -> None:
    wanted = r"retention_weight \(1\), found identity\.prompts\.retention_prompts 0 and .* 'neutral'"
    with pytest.raises(UsageError, match=wanted):
        parse({"retention_weight": 1.0}, prompts={"retention_prompts": 0})
    assert parse({"retention_weight": 1.0, "retention_pictures": "safe"}, prompts={"retention_prompts": 0})


def test_the_same_settings_are_taken_where_they_act() -> None:
    for dpo in (
        {"error_weighting": "min_snr", "min_snr_gamma": 4.0},
        {"min_snr_gamma": 5.0},
        {"redirection_weight": 2.0, "captions": "both"},
        {"retention_weight": 0.0, "retention_per_step": 0},
        {"captions": "safe"},
    ):
        found = parse(dpo)
        assert {name: getattr(found, name) for name in dpo} == dpo
