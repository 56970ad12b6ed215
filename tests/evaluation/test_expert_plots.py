from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from safetydpo.evaluation.expert_plots import (
    MOST_NAMED_EXPERTS,
    NO_CATEGORY,
    block_of,
    cluster_by_category,
    layer_shares,
    plot_overlap,
    plot_winners,
)
from safetydpo.evaluation.plots import CSS_VARIABLES
from safetydpo.evaluation.report_records import ExpertOverlap, LayerWinners
from tests.evaluation.synthetic import CATEGORIES, make_overlap, make_winners


def texts(svg: str) -> str:
    return " ".join(ElementTree.fromstring(svg).itertext())


def test_few_experts_have_rows_and_numbers_of_their_own():
    plot = plot_overlap(make_overlap())
    for svg in (plot.wide, plot.narrow):
        assert "illegal activity" in texts(svg)
        assert "1.00" in texts(svg)
        assert "shared input space" in texts(svg)
        assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r'(?:href="|url\()#\w+', "", svg))
        assert not any(stand_in in svg for stand_in in CSS_VARIABLES)
    assert plot_overlap(make_overlap()) == plot


def test_hundreds_of_experts_are_means_per_category_and_say_so():
    many = make_overlap(experts=70)
    plot = plot_overlap(many)
    assert "hate-0" not in texts(plot.wide)
    assert "hate (10)" in texts(plot.wide)
    assert "means per category of 70" in plot.description
    most = plot_overlap(make_overlap(experts=MOST_NAMED_EXPERTS)).wide
    assert "hate-0" in texts(most)
    assert len(plot.wide) < len(most)


def test_means_over_pairs_by_hand():
    """Experts a1, a2 of a, b of b: a-a is the one pair 0.5, a-b the mean of 0.2 and 0.4, b-b has no pair: 1."""
    values = ((1.0, 0.5, 0.2), (0.5, 1.0, 0.4), (0.2, 0.4, 1.0))
    found = cluster_by_category(
        ExpertOverlap(("a1", "b", "a2"), (("a",), ("b",), ("a", "b")), *(reordered(values),) * 3)
    )
    assert found.names == ("a (2)", "b (1)")
    assert found.cosine[0] == pytest.approx((0.5, 0.3))
    assert found.cosine[1] == pytest.approx((0.3, 1.0))
    unknown = cluster_by_category(ExpertOverlap(("x",), ((),), ((1.0,),), ((1.0,),), ((1.0,),)))
    assert unknown.names == (f"{NO_CATEGORY} (1)",)


def reordered(values: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    """From the order a1, a2, b to a1, b, a2."""
    order = (0, 2, 1)
    return tuple(tuple(values[i][j] for j in order) for i in order)


def test_shares_of_a_layer_by_hand():
    """4 + 1 of 8 rows are won by experts of hate, 3 by one of no category."""
    won = LayerWinners("co_merge", (("q", {"h1": 4, "h2": 1, "x": 3}),), {"h1": ("hate",), "h2": ("hate", "sexual")})
    assert layer_shares(won, by_category=False) == [{"h1": 0.5, "h2": 0.125, "x": 0.375}]
    assert layer_shares(won, by_category=True) == [{"hate": 0.625, NO_CATEGORY: 0.375}]


def test_winners_are_named_or_grouped_and_their_number_is_said():
    plot = plot_winners(make_winners())
    assert "illegal activity" in texts(plot.wide)
    assert re.search(r"co_merge: on average \d\.\d of 7 experts supply a layer, .* in 32 layers", plot.description)
    assert "up 1" in texts(plot.narrow)
    many = plot_winners(make_winners(experts=120, layers=280))
    assert "shown by category" in many.description
    assert all(name.replace("_", " ") in texts(many.wide) for name in CATEGORIES)
    assert len(many.wide) < 400_000


def test_a_single_supplier_fills_the_layer():
    one = replace(make_winners(), layers=(("mid_block.q", {"hate": 68}),))
    assert "on average 1.0 of 7 experts supply a layer, at least 1 and at most 1" in plot_winners(one).description


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("down_blocks.2.attentions.0.q", "down 2"),
        ("mid_block.attentions.0.q", "mid"),
        ("transformer_blocks.12.attn.to_q", "layer 12"),
        ("single_transformer_blocks.3.attn.to_q", "single 3"),
        ("conv_in", "conv_in"),
    ],
)
def test_names_of_blocks(layer, block):
    assert block_of(layer) == block
