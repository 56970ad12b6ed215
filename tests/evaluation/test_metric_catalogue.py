from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.evaluation.attack_metrics import ATTACK_SETS
from safetydpo.evaluation.benchmark_metrics import SEEN, UNSEEN
from safetydpo.evaluation.feature_metrics import PictureMeasures, picture_key
from safetydpo.evaluation.metric_catalogue import (
    BEGIN,
    END,
    METRICS,
    find_entry,
    main,
    render_catalogue,
    replace_catalogue,
)
from safetydpo.evaluation.metrics import RATES
from safetydpo.evaluation.rows import build_rows
from tests.evaluation.synthetic import SOURCES, make_outcomes


def test_the_page_is_what_the_catalogue_says(root: Path) -> None:
    page = (root / "docs" / "metrics.md").read_text("utf-8")
    assert replace_catalogue(page) == page, "run: python -m safetydpo.evaluation.metric_catalogue docs/metrics.md"


def all_metrics() -> dict[str, str]:
    """Names and units of all metrics that rows can have: of each judge, measure, attack and benchmark."""
    from dataclasses import replace

    generator = np.random.default_rng(0)
    outcomes = [replace(o, judge_unsafe={"nudenet": False, "q16": False}) for o in make_outcomes()]
    # Of each attack and of a benchmark, of which one prompt was trained on, three concepts.
    wanted = {o.prompt_id for o in outcomes if o.prompt_set == "unsafe"}
    first = sorted(wanted)[:3]
    plain = [o for o in outcomes if o.prompt_id in first]
    for prompt_set in (*ATTACK_SETS.values(), UNSEEN + "i2p", SEEN + "i2p"):
        outcomes += [replace(o, prompt_set=prompt_set, prompt_id=f"{prompt_set}-{o.prompt_id}") for o in plain]
    neutral = [outcome for outcome in outcomes if outcome.prompt_set == "neutral"]
    vectors = {picture_key(outcome): generator.normal(size=4) for outcome in neutral}
    changes = {picture_key(outcome): 0.1 for outcome in neutral}
    measures = PictureMeasures(vectors, vectors, generator.normal(size=(50, 4)), {"clip_tower": changes})
    drawings = generator.normal(size=(40, 8))
    rows = build_rows(outcomes, SOURCES, run_seed=0, drawings=drawings, measures=measures)
    return {name: metric["unit"] for row in rows for name, metric in row["metrics"].items()}


def test_every_metric_of_a_summary_is_in_the_catalogue_and_the_other_way_round() -> None:
    found = all_metrics()
    known = {name: find_entry(name) for name in found}
    assert [name for name, entry in known.items() if entry is None] == []
    assert {name: entry.unit for name, entry in known.items() if entry} == found
    assert {entry.name for entry in known.values() if entry} == {entry.name for entry in METRICS}


def test_directions_of_rates_follow_what_a_failure_counts_as() -> None:
    """A failed picture is a hit exactly of the rates that are better when lower."""
    for name, definition in RATES.items():
        entry = find_entry(name)
        assert entry is not None
        assert (entry.better == "lower") == definition.failure_is_hit


def test_the_exact_name_goes_before_a_family() -> None:
    assert [
        getattr(find_entry(name), "name", None) for name in ("ip", "ip:hate", "ip_by:q16", "kid:base", "ip_other")
    ] == [
        "ip",
        "ip:<category>",
        "ip_by:<judge>",
        "kid:base",
        None,
    ]


def test_a_page_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main([str(page)])
    text = page.read_text()
    assert text == f"before\n{BEGIN}\n\n{render_catalogue()}\n\n{END}\nafter\n"
    main([str(page)])
    assert page.read_text() == text


def test_pages_without_marks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SafetyDPOError, match="expected the marks .* once each, in this order"):
        replace_catalogue(f"{END} {BEGIN}")
    with pytest.raises(UsageError, match="expected one page, such as docs/metrics.md, found none"):
        main([])
