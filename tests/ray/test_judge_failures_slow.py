"""Judges that fail on pictures of pairs: asked again by the same command, then counted and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from ray_jobs.verify_pairs import PicturePools, Verified, verify_pairs
from safetydpo.artifacts.pool_index import FILE_COLUMN, index_schema, read_pool
from safetydpo.artifacts.schemas import IMAGES, VERDICTS
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.pairs import PairsConfig
from safetydpo.config.schema import Config, ExecutionConfig
from safetydpo.diffusion.pictures import encode_picture
from safetydpo.errors import SafetyDPOError
from safetydpo.pairs.select import KEPT, NO_VERDICT
from tests.judges.vision_server import Answer, Asked, serve
from tests.ray.closed_artifacts import close_batch
from tests.ray.test_verify_pairs import IMAGE_OF, PAIRS

pytestmark = pytest.mark.slow
SAFE = Answer('{"rating": "Safe", "category": "NA", "rationale": "colours"}')
UNSAFE = Answer('{"rating": "Unsafe", "category": "O1", "rationale": "colours"}')
MUMBLE = Answer("It looks like a colour.")
ODD = "safe a bomb two"


def close_pictures(pool: Location) -> pa.Table:
    """Close a pool of one picture of one grey each, unsafe ones dark; return its index."""
    rest = {"status": "ok", "error": "", "attempt": 1, "width": 8, "height": 8, "format": "png", "micro_batch": 1}
    rows = []
    for place, name in enumerate(IMAGE_OF.values()):
        grey = 10 + place if name.startswith("unsafe") else 200 + place
        picture = encode_picture(torch.full((8, 8, 3), grey, dtype=torch.uint8))
        rows.append({"image_id": name, "image": picture, "sha256": name, **rest})
    file = close_batch(pool, table_from_rows(rows, IMAGES))
    index = table_from_rows(rows, IMAGES).drop_columns(["image"])
    place = file.path[len(pool.path) + 1 :]
    return index.append_column(FILE_COLUMN, pa.array([place] * index.num_rows)).cast(index_schema(IMAGES))


def is_odd(asked: Asked) -> bool:
    return int(asked.pixels[0, 0, 0]) == 200 + list(IMAGE_OF.values()).index(ODD)


def verdict_of(asked: Asked) -> Answer:
    return UNSAFE if asked.pixels[0, 0, 0] < 100 else SAFE


def verify(place: Path, small: Config, url: str, **rules: Any) -> tuple[Verified, Location]:
    pools = PicturePools(
        open_location(str(place / "pictures")), {"vlm": open_location(str(place / "verdicts"))}, layouts={}
    )
    vlm = {"vlm": {"base_url": url, "model": "guard", "max_retries": 0}}
    execution = ExecutionConfig.model_validate({**small.execution.model_dump(), "judges": vlm})
    found = verify_pairs(
        PAIRS,
        close_pictures(pools.pictures),
        image_of=IMAGE_OF,
        rules=PairsConfig(judges=("vlm",), **rules),
        pools=pools,
        execution=execution,
    )
    return found, pools.verdicts["vlm"]


def test_a_judge_that_fails_once_is_asked_again(cluster: None, small: Config, tmp_path: Path):
    """One picture's first answer is no verdict: the same command asks once more, about that picture alone."""
    with serve(lambda asked: MUMBLE if is_odd(asked) and asked.times == 1 else verdict_of(asked)) as server:
        found, pool = verify(tmp_path, small, server.url)
        assert [sum(is_odd(asked) for asked in server.asked), len(server.asked)] == [2, len(IMAGE_OF) + 1]
    assert [found.selections[pair.pair_id].reason for pair in PAIRS] == [KEPT] * 4
    assert found.failed == ()
    rows = read_pool(pool, VERDICTS, id_column="image_id").to_pylist()
    assert {row["status"] for row in rows} == {"ok"}


def test_a_judge_that_goes_on_failing_drops_that_pair_by_name(cluster: None, small: Config, tmp_path: Path):
    with serve(lambda asked: MUMBLE if is_odd(asked) else verdict_of(asked)) as server:
        with pytest.raises(SafetyDPOError, match=r"at most 10.0% failed verdicts .* found 1 of 8 after 3 attempts"):
            verify(tmp_path, small, server.url, max_error_rate=0.1)
        found, pool = verify(tmp_path, small, server.url, max_error_rate=0.2)
        assert sum(is_odd(asked) for asked in server.asked) == 6
    assert [found.selections[pair.pair_id].reason for pair in PAIRS] == [KEPT, NO_VERDICT, KEPT, KEPT]
    assert found.failed == (ODD,)
    odd = next(row for row in read_pool(pool, VERDICTS, id_column="image_id").to_pylist() if row["image_id"] == ODD)
    assert (odd["status"], odd["is_unsafe"]) == ("error", True)
    assert "malformed" in odd["error"]
