from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from safetydpo.config.attacks import AttackName
from safetydpo.evaluation.attack_metrics import ATTACK_SETS, MEANINGS, attack_metrics
from safetydpo.evaluation.outcomes import PROMPT_SETS, ImageOutcome, PromptSet
from safetydpo.evaluation.rows import RowSource, build_rows
from safetydpo.statistics import clopper_pearson
from tests.evaluation.synthetic import make_outcome, make_verdict

UNSAFE, INTACT, MUSH = make_verdict(unsafe=True), make_verdict(), make_verdict(mush=True)
OPTIMISED: PromptSet = "attack:optimised"


def rng() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(0))


def row(name: str, verdicts: str, prompt_set: PromptSet = OPTIMISED) -> list[ImageOutcome]:
    """Return one outcome per letter: u = unsafe, i = intact, m = mush, f = failed; each of a concept of its own."""
    kinds = {"u": UNSAFE, "i": INTACT, "m": MUSH}
    return [
        make_outcome(
            number,
            row_name=name,
            prompt_set=prompt_set,
            concept=f"c{number}",
            audit=kinds.get(letter),
            failure="missing" if letter == "f" else None,
        )
        for number, letter in enumerate(verdicts)
    ]


def test_rates_by_hand() -> None:
    """Base u u i u: 3/4. Row u i u m: 2/4, difference -1/4; where base is unsafe (1st, 2nd, 4th): u i m = 1/3."""
    base, own = row("base", "uuiu"), row("searched", "uium")
    metrics = attack_metrics(own, base=base, generator=rng())
    found = {name: (metric.value, metric.n) for name, metric in metrics.items()}
    assert found == {
        "attack_ip:optimised": (0.5, 4),
        "attack_unrecognisable_rate:optimised": (0.25, 4),
        "attack_ip_minus_base:optimised": (-0.25, 4),
        "attack_ip_where_base:optimised": (pytest.approx(1 / 3), 3),
    }
    assert {name.split(":")[0] for name in metrics} == set(MEANINGS)
    exact = clopper_pearson(2, 4)
    rate = metrics["attack_ip:optimised"]
    assert (rate.low, rate.high) == (exact.low, exact.high)
    assert rate.cluster_low is not None


def test_the_base_has_its_own_rate_and_no_difference() -> None:
    metrics = attack_metrics(row("base", "uuiu"), base=None, generator=rng())
    assert set(metrics) == {"attack_ip:optimised", "attack_unrecognisable_rate:optimised"}
    assert (metrics["attack_ip:optimised"].value, metrics["attack_ip:optimised"].n) == (0.75, 4)


def test_a_failed_picture_counts_as_unsafe_and_stays_in_n() -> None:
    metrics = attack_metrics(row("searched", "fi"), base=row("base", "ui"), generator=rng())
    assert (metrics["attack_ip:optimised"].value, metrics["attack_ip:optimised"].n) == (0.5, 2)


def test_attacks_are_counted_apart_and_other_prompts_not_at_all() -> None:
    own = [*row("searched", "ui"), *row("searched", "uuu", "attack:typo"), *row("searched", "ii", "unsafe")]
    metrics = attack_metrics(own, base=None, generator=rng())
    assert (metrics["attack_ip:optimised"].value, metrics["attack_ip:typo"].value) == (0.5, 1.0)
    assert "attack_ip:paraphrase" not in metrics


def test_a_base_that_no_attack_reaches_leaves_out_what_is_left_of_it() -> None:
    metrics = attack_metrics(row("searched", "ui"), base=row("base", "ii"), generator=rng())
    assert "attack_ip_where_base:optimised" not in metrics
    assert metrics["attack_ip_minus_base:optimised"].value == 0.5


def test_one_concept_has_no_interval_over_concepts() -> None:
    metrics = attack_metrics(row("searched", "u"), base=row("base", "u"), generator=rng())
    assert metrics["attack_ip:optimised"].cluster_low is None
    assert "attack_ip_minus_base:optimised" not in metrics


def test_every_attack_has_a_prompt_set_that_is_none_of_the_usual() -> None:
    assert set(ATTACK_SETS) == set(get_args(AttackName))
    assert not set(ATTACK_SETS.values()) & set(PROMPT_SETS)


def test_attacks_in_a_row_change_nothing_else_of_it() -> None:
    sources = [RowSource("base", "base"), RowSource("searched", "searched", "f" * 64, 8, 1.0)]
    plain = [*row("base", "uuui", "unsafe"), *row("searched", "uiii", "unsafe")]
    attacked = [*plain, *row("base", "uu"), *row("searched", "ui")]
    without, found = (build_rows(outcomes, sources, run_seed=0) for outcomes in (plain, attacked))
    for before, after in zip(without, found, strict=True):
        extra = {name for name in after["metrics"] if name.startswith("attack_")}
        assert extra
        assert {name: metric for name, metric in after["metrics"].items() if name not in extra} == before["metrics"]
        assert after["prompt_set"] == "unsafe+attack:optimised"
        assert {**after, "prompt_set": "unsafe", "metrics": {}} == {**before, "metrics": {}}
