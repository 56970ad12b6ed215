"""From pools of verdicts and layouts to selections: the pools are closed by hand, so that nothing has to be made."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.pair_workers import Measure
from ray_jobs.verify_pairs import (
    Layouts,
    PicturePools,
    check_verification,
    fingerprint_judges,
    fingerprint_measures,
    layout_limits,
    verify_pairs,
)
from safetydpo.artifacts.pool_index import index_schema
from safetydpo.artifacts.schemas import IMAGES, LAYOUTS, VERDICTS
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.pairs import PairsConfig
from safetydpo.config.schema import BaseModelConfig, ExecutionConfig, IdentityConfig, SamplerConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.build import fingerprint_judge
from safetydpo.pairs.select import CAPPED, KEPT, MISSING
from safetydpo.prompts.sets import PromptPair
from tests.diffusion.tiny_models import build_model
from tests.ray.closed_artifacts import close_batch

PAIRS = [
    PromptPair(f"a bomb {name}", f"a ball {name}", "violence", ("violence",), concept=concept, source="test")
    for name, concept in (("one", "bomb"), ("two", "bomb"), ("three", "bomb"), ("four", "axe"))
]
IMAGE_OF = {(pair.pair_id, side): f"{side} {pair.unsafe_text}" for pair in PAIRS for side in ("unsafe", "safe")}
NAMES = ["one", "two", "three", "four"]
REAL = PairsConfig(judges=("open_nsfw",))


def images(*missing: str) -> pa.Table:
    rest = {"sha256": "x", "status": "ok", "error": "", "attempt": 1, "width": 8, "height": 8, "format": "png"}
    rest |= {"micro_batch": 1, "file": "batch-by-hand/data/part.parquet"}
    rows = [{"image_id": name, **rest} for name in IMAGE_OF.values() if name not in missing]
    return table_from_rows(rows, index_schema(IMAGES))


def close_verdicts(pool: Location, unsafe: dict[str, float], *, blur: float | None = 0.0) -> Location:
    """Close a judge's pool: scores of the pictures named, 0.9 and 0.1 of the others."""
    rest = {"judge": "hand", "version": "1", "concept": None, "background": None, "is_unsafe": False}
    rest |= {"is_unrecognisable": None, "unrecognisable_score": blur}
    rows = [
        {"image_id": name, "unsafe_score": unsafe.get(name, 0.9 if name.startswith("unsafe") else 0.1), **rest}
        for name in IMAGE_OF.values()
    ]
    close_batch(pool, table_from_rows(rows, VERDICTS))
    return pool


def pools_of(verdicts: dict[str, Location], layouts: dict[Measure, Location]) -> PicturePools:
    """Pools of answers that are all there, so that nobody looks for the pictures."""
    return PicturePools(open_location("/nowhere"), verdicts, layouts)


def verify(pools: PicturePools, *missing: str, **rules: Any) -> tuple[list[str], tuple[str, ...]]:
    found = verify_pairs(
        PAIRS,
        images(*missing),
        image_of=IMAGE_OF,
        rules=PairsConfig(**rules),
        pools=pools,
        execution=ExecutionConfig(),
    )
    return [found.selections[pair.pair_id].reason for pair in PAIRS], found.not_judged


def test_the_greatest_score_of_several_judges_counts(store: Location):
    """`one` is unsafe to the second judge only, the safe picture of `two` too; the others are good to both."""
    first = close_verdicts(store / "first", {"unsafe a bomb one": 0.2})
    second = close_verdicts(store / "second", {"unsafe a bomb one": 0.7, "safe a bomb two": 0.8}, blur=None)
    both = pools_of({"demo_select": first, "open_nsfw": second}, {})
    reasons, not_judged = verify(both, judges=("demo_select", "open_nsfw"))
    assert reasons == [KEPT, "safe picture is not safe", KEPT, KEPT]
    assert not_judged == ()
    reasons, not_judged = verify(pools_of({"open_nsfw": second}, {}), judges=("open_nsfw",))
    assert reasons == [KEPT, "safe picture is not safe", KEPT, KEPT]
    assert not_judged == ("unrecognisable_max",)


def test_a_picture_that_is_missing_drops_its_pair(store: Location):
    pools = pools_of({"demo_select": close_verdicts(store / "first", {})}, {})
    assert verify(pools, "safe a bomb two")[0] == [KEPT, MISSING, KEPT, KEPT]


def test_layouts_that_are_too_far_apart(store: Location):
    """The luminance of `one` differs by 0.5 everywhere; the embeddings of `two` are opposite: distance 2."""
    verdicts = {"demo_select": close_verdicts(store / "first", {})}
    for measure, odd, value in (("pixels", "safe a bomb one", 0.5), ("embedding", "safe a bomb two", -1.0)):
        common = [0.0] * 64 if measure == "pixels" else [1.0, 0.0]
        rows = [
            {"image_id": name, "values": [value] * 64 if name == odd and measure == "pixels" else common}
            for name in IMAGE_OF.values()
        ]
        rows = [row | ({"values": [value, 0.0]} if row["image_id"] == odd and value < 0 else {}) for row in rows]
        close_batch(store / measure, table_from_rows(rows, LAYOUTS))
    pools = pools_of(verdicts, {"pixels": store / "pixels", "embedding": store / "embedding"})
    assert verify(pools)[0] == [KEPT] * 4
    assert verify(pools, layout_pixel_max=0.5)[0] == [KEPT] * 4
    assert verify(pools, layout_pixel_max=0.4, layout_embedding_max=1.0)[0] == [
        "layouts are too far apart (pixels)",
        "layouts are too far apart (embedding)",
        KEPT,
        KEPT,
    ]


def test_a_concept_keeps_its_best_pairs(store: Location):
    """Margins of `bomb`: 0.8, 0.9 - 0.4 = 0.5, 0.7 - 0.1 = 0.6; a dropped pair takes no place."""
    scores = {"safe a bomb two": 0.4, "unsafe a bomb three": 0.7}
    pools = pools_of({"demo_select": close_verdicts(store / "first", scores)}, {})
    assert verify(pools, max_kept_per_concept=2)[0] == [KEPT, CAPPED, KEPT, KEPT]
    assert verify(pools, max_kept_per_concept=1)[0] == [KEPT, CAPPED, CAPPED, KEPT]
    assert verify(pools, "unsafe a bomb one", max_kept_per_concept=1)[0] == [MISSING, CAPPED, KEPT, KEPT]


def test_the_cap_leaves_pairs_without_a_concept_alone(store: Location, monkeypatch: pytest.MonkeyPatch):
    """All four without one are kept; a pair that has one elsewhere competes in that."""
    pools = pools_of({"demo_select": close_verdicts(store / "first", {"unsafe a bomb one": 0.8})}, {})
    without = [replace(pair, concept="") for pair in PAIRS]
    monkeypatch.setattr(f"{__name__}.PAIRS", without)
    assert verify(pools, max_kept_per_concept=1)[0] == [KEPT] * 4
    monkeypatch.setattr(
        f"{__name__}.PAIRS", [*without, replace(PAIRS[0], concept="axe"), replace(PAIRS[3], concept="axe")]
    )
    assert verify(pools, max_kept_per_concept=1)[0][:4] == [CAPPED, KEPT, KEPT, KEPT]


def test_layouts_are_held_as_one_matrix():
    """4 bytes a number: 1,000 embeddings of 512 take 2 MB, where lists of Python floats took 16."""
    numbers = np.random.default_rng(0).normal(size=(1000, 512)).astype(np.float32)
    ids = [f"picture {row:04}" for row in range(1000)]
    values = pa.array(list(numbers), type=LAYOUTS.field("values").type)
    table = pa.table({"image_id": ids, "values": values}, schema=LAYOUTS)
    tracemalloc.start()
    layouts = Layouts.from_table(pa.concat_tables([table.slice(0, 300), table.slice(300)]))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 3e6
    assert layouts.values.dtype == np.float32
    assert all(np.array_equal(layouts[image_id], row) for image_id, row in zip(ids, numbers, strict=True))
    assert "picture 0999" in layouts
    assert "picture" not in layouts
    assert Layouts.from_table(LAYOUTS.empty_table()).places == {}
    uneven = table_from_rows([{"image_id": name, "values": [0.5] * len(name)} for name in ("a", "bb")], LAYOUTS)
    with pytest.raises(SafetyDPOError, match=r"expected layouts of equally many numbers each, found rows of \[1, 2\]"):
        Layouts.from_table(uneven)


def test_which_measures_and_networks_are_asked():
    assert layout_limits(PairsConfig()) == {}
    assert layout_limits(PairsConfig(layout_pixel_max=0.0, layout_embedding_max=0.3)) == {
        "pixels": 0.0,
        "embedding": 0.3,
    }
    assert fingerprint_measures(PairsConfig(layout_pixel_max=0.1)) == {}
    assert list(fingerprint_measures(PairsConfig(layout_embedding_max=0.1))) == ["layout_clip"]
    alone, other = fingerprint_judge("demo_select"), fingerprint_judge("open_nsfw")
    assert fingerprint_judges(PairsConfig()) == alone
    assert fingerprint_judges(PairsConfig(judges=("demo_select", "open_nsfw"))) == f"{alone}+{other}"
    with pytest.raises(UsageError, match=r"found 'nobody': correct identity\.pairs\.judges$"):
        fingerprint_judges(PairsConfig(judges=("nobody",)))


def test_the_demo_worlds_networks_are_refused_for_other_pictures():
    large = SamplerConfig(height=512, width=768)
    told = (
        r"^expected pictures of 32 x 32 \(identity.sampler\) for {}, which knows .* only, found 512 x 768: name one for"
    )
    with pytest.raises(UsageError, match=told.format(r"judge 'demo_select' of identity\.pairs\.judges")):
        check_verification(IdentityConfig(sampler=large, pairs=PairsConfig(judges=("open_nsfw", "demo_select"))))
    real = PairsConfig(judges=("open_nsfw",), layout_pixel_max=0.5)
    check_verification(IdentityConfig(sampler=large, pairs=real))
    embedded = real.model_copy(update={"layout_embedding_max": 0.5})
    with pytest.raises(UsageError, match=told.format(r"identity\.pairs\.layout_clip 'demo'")):
        check_verification(IdentityConfig(sampler=large, pairs=embedded))


def test_what_a_model_cannot_draw_is_refused_before_anything_is_drawn(tmp_path: Path):
    """SDEdit away from a prompt needs an unguided branch; a fourth level of the autoencoder makes the factor 16."""
    build_model("flux-dev", tmp_path)
    base = BaseModelConfig(model=str(tmp_path))
    away = PairsConfig(safe_picture="sdedit")
    check_verification(IdentityConfig(base=base, pairs=away.model_copy(update={"sdedit_negative": "empty"})))
    with pytest.raises(
        UsageError,
        match=r"unguided branch for identity\.pairs\.sdedit_negative=unsafe_prompt, found '.*', which is told",
    ):
        check_verification(IdentityConfig(base=base, pairs=away))
    check_verification(IdentityConfig(base=base, sampler=SamplerConfig(height=40), pairs=REAL))
    config = tmp_path / "vae" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "block_out_channels": [8, 8, 8, 8]}))
    with pytest.raises(
        UsageError, match=r"multiples of 16 for base\.model .*\(FluxPipeline\), found 40 x 32: change iden"
    ):
        check_verification(IdentityConfig(base=base, sampler=SamplerConfig(height=40), pairs=REAL))
