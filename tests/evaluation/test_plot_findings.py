from __future__ import annotations

from dataclasses import replace

from safetydpo.evaluation.plot_findings import (
    find_overlap,
    find_rates,
    find_search,
    find_tradeoff,
    find_training,
    find_winners,
)
from safetydpo.evaluation.report_records import (
    ExpertOverlap,
    LayerWinners,
    SearchTrial,
    SearchTrials,
    TrainingCurve,
)
from safetydpo.evaluation.summary import MetricRecord, SummaryRow


def rate(value: float) -> MetricRecord:
    return {"value": value, "low": value / 2, "high": min(1.0, 2 * value), "n": 20, "unit": "rate"}


def make_row(name: str, kind: str, **metrics: float) -> SummaryRow:
    named = {key.replace("__", ":"): rate(value) for key, value in metrics.items()}
    return {
        "name": name, "kind": kind, "adapter_hash": None, "rank": None, "scale": None, "prompt_set": "unsafe",
        "split": "test", "seed": 0, "metrics": named,
    }  # type: ignore[typeddict-item]  # fmt: skip


BASE = make_row("base", "base", ip=1.0, ip__hate=1.0, ip__self_harm=0.9, neutral_rate=1.0)
BEST = make_row("searched", "searched", ip=0.1, ip__hate=0.0, ip__self_harm=0.2, neutral_rate=0.9)


def test_rates_by_hand() -> None:
    assert find_rates([BASE, BEST], ["hate", "self_harm"], prefix="ip:", highlight="searched") == (
        "searched is highest in self harm with 0.20 (95 % interval 0.10–0.40, n = 20), lowest with 0.00; the base lies "
        "between 0.90 and 1.00."
    )
    assert find_rates([BEST], ["hate"], prefix="ip:", highlight="searched").endswith("lowest with 0.00.")
    assert find_rates([BASE], ["typo"], prefix="attack_ip:", highlight="") == "Rates with 95 % intervals of base."


def test_the_tradeoff_by_hand() -> None:
    assert find_tradeoff([BASE, BEST], highlight="searched") == (
        "searched draws IP 0.10 and keeps neutral 0.90; no row draws less."
    )
    safer = make_row("sum", "merged", ip=0.05)
    assert find_tradeoff([BASE, BEST, safer], highlight="searched").endswith("; less is drawn by sum.")
    assert find_tradeoff([BASE], highlight="") == "IP against harmless pictures kept, of base."


def test_the_search_by_hand() -> None:
    first = SearchTrial(3, "ties", 0.2, 0.0, 0.2, 0.95, 0.9, feasible=True, on_front=True, chosen=True)
    second = replace(first, number=4, feasible=False, chosen=False)
    assert find_search(SearchTrials((first, second), 0.9, 0.8)) == (
        "2 trials: 1 keep both floors, 2 lie on the Pareto front; chosen is trial 3 (ties) with IP 0.20, 0.95 of the "
        "base's neutral rate and 0.90 of its neighbours."
    )
    assert find_search(SearchTrials((second,), 0.9, 0.8)).endswith("; none of them was chosen.")


def test_training_by_hand() -> None:
    curves = [
        TrainingCurve("hate", (1, 2), {"loss": (0.7, 0.25), "gradient_norm": (1.0, 2.0)}),
        TrainingCurve("self_harm", (1, 2), {"loss": (0.7, 0.5)}),
    ]
    assert find_training(curves) == (
        "Training of 2 experts: loss ends at 0.25 (hate) to 0.5 (self harm); gradient norm ends at 2 in all."
    )


def test_overlap_by_hand() -> None:
    """Of three pairs, a and b (0.5) are most alike, b and c (-0.1) least."""
    cosine = ((1.0, 0.5, 0.2), (0.5, 1.0, -0.1), (0.2, -0.1, 1.0))
    overlap = ExpertOverlap(("a", "b", "c"), ((), (), ()), cosine, cosine, cosine)
    assert find_overlap(overlap, num_experts=3) == (
        "3 experts: the changes of a and b are most alike (cosine 0.50), those of b and c least (−0.10)."
    )
    assert find_overlap(overlap, num_experts=90).startswith("3 rows, means per category of 90 experts: ")


def test_winners_by_hand() -> None:
    """Two layers: hate supplies 6 of 8 rows and 4 of 4, which is 10 of 12."""
    winners = LayerWinners("co_merge", (("x", {"hate": 6, "sexual": 2}), ("y", {"hate": 4})), {})
    assert find_winners(winners, by_category=False) == (
        "co_merge: on average 1.5 of 2 experts supply a layer, at least 1 and at most 2 in 2 layers; hate supplies "
        "most rows (83 %)."
    )
