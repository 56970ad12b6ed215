"""The actors that measure stored pictures, called in this process: real networks, no Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from ray_jobs.picture_features import CHANGE_MANIFEST
from ray_jobs.picture_workers import ChangeWorker, FeatureWorker
from safetydpo.artifacts.layout import demo_weights
from safetydpo.artifacts.schemas import OUTCOMES
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.diffusion.pictures import encode_picture
from safetydpo.errors import SafetyDPOError
from safetydpo.judges.features import InceptionFeatures
from safetydpo.judges.inception import InceptionV3
from safetydpo.judges.perceptual import ClipTowerDistance
from tests.ray.closed_artifacts import close_batch

CLIP = demo_weights() / "clip"


def pictures(number: int, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, side, side, 3), generator=generator, dtype=torch.uint8)


def outcome_row(image_id: str, image: bytes | None) -> dict[str, object]:
    """A stored outcome, of which only the picture matters here."""
    texts = dict.fromkeys(("select_concept", "select_background", "audit_concept", "audit_background"), "")
    flags = ("select_unsafe", "select_unrecognisable", "audit_unsafe", "audit_unrecognisable")
    good = {"status": "ok", "error": ""} if image is not None else {"status": "error", "error": "memory ran out"}
    row = {"image_id": image_id, "image": image, "attempt": 1, "clip_embedding": [], "micro_batch": None, **good}
    return {**row, **texts, **dict.fromkeys(flags, False)}


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file({**InceptionV3("fid").state_dict(), "fc.weight": torch.zeros(1008, 2048)}, file)
    return file


def changes(pool: Location, pairs: list[tuple[str, str]], files: dict[str, bytes]) -> pa.Table:
    """Manifest rows with the picture attached, as the pool gives them, and the place of the base's."""
    rows = [
        {
            "change_id": f"{own}-{base}",
            "attempt": 1,
            "image_id": own,
            "file": "-",
            "base_image_id": base,
            "base_file": "-",
        }
        for own, base in pairs
    ]
    table = table_from_rows(rows, CHANGE_MANIFEST)
    name = "batch-by-hand/data/part.parquet"
    table = table.set_column(
        table.schema.get_field_index("base_file"), "base_file", pa.array([name] * len(pairs), type=pa.string())
    )
    return table.drop_columns(["file"]).append_column("image", pa.array([files[own] for own, _ in pairs], pa.binary()))


def test_changes_are_those_of_the_network_and_one_bad_picture_takes_no_other_along(store: Location) -> None:
    images = pictures(3)
    files = {name: encode_picture(image) for name, image in zip("abc", images, strict=True)} | {"bad": b"no picture"}
    close_batch(store, table_from_rows([outcome_row(name, data) for name, data in files.items()], OUTCOMES))
    worker = ChangeWorker("clip_tower", str(CLIP), store, batch_size=4)
    found = worker(changes(store, [("a", "c"), ("b", "c"), ("bad", "c"), ("a", "bad"), ("c", "c")], files)).to_pylist()
    # One pair alone in a padded pass: a distance does not depend on its neighbours.
    expected = ClipTowerDistance(CLIP).distance(images, images[[2, 2, 2]])
    assert [row["change_id"] for row in found] == ["a-c", "b-c", "bad-c", "a-bad", "c-c"]
    assert [row["distance"] for row in found[:2]] == pytest.approx(expected[:2].tolist(), rel=1e-5)
    assert found[4]["distance"] == 0.0
    assert [row["status"] for row in found] == ["ok", "ok", "error", "error", "ok"]
    assert "expected a complete PNG or WebP, found 10 bytes" in found[2]["error"]
    assert found[3]["distance"] is None


def test_a_base_picture_that_is_gone_is_named(store: Location) -> None:
    files = {"a": encode_picture(pictures(1)[0])}
    close_batch(store, table_from_rows([outcome_row("a", files["a"])], OUTCOMES))
    worker = ChangeWorker("clip_tower", str(CLIP), store, batch_size=4)
    with pytest.raises(SafetyDPOError, match="expected the row gone in .*, where its index says it is, found it gone"):
        worker(changes(store, [("a", "gone")], files))


def test_features_of_stored_and_of_given_pictures(inception_file: Path, tmp_path: Path) -> None:
    """Equal from a table and from files; sizes may differ among files; what cannot be read is an error row."""
    images = pictures(2)
    files = [encode_picture(image) for image in images]
    worker = FeatureWorker(str(inception_file), batch_size=2)
    stored = worker(pa.table({"image_id": ["a", "b"], "attempt": [1, 1], "image": files})).to_pylist()
    expected = InceptionFeatures(inception_file).embed(images).numpy()
    np.testing.assert_allclose([row["values"] for row in stored], expected, rtol=1e-4, atol=1e-5)
    for name, data in zip(
        ("a.png", "b.png", "wide.png", "bad.png"), [*files, encode_picture(pictures(1, 48)[0]), b""], strict=True
    ):
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in ("a.png", "wide.png", "bad.png", "none.png")]
    table = pa.table({"image_id": ["a", "wide", "bad", "none"], "attempt": [1] * 4, "path": paths})
    given = worker(table).to_pylist()
    assert [row["status"] for row in given] == ["ok", "ok", "error", "error"]
    np.testing.assert_allclose(given[0]["values"], stored[0]["values"], rtol=1e-4, atol=1e-5)
    assert given[2]["values"] == []
    assert "found 0 bytes that do not decode" in given[2]["error"]
    assert "No such file" in given[3]["error"]


def test_features_that_are_not_finite_are_an_error_row(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture whose features are NaN (half precision overflows so) is named; its neighbour keeps its own."""
    worker = FeatureWorker(str(inception_file), batch_size=2)
    images = pictures(2)
    images[1] = 255
    embed = worker._network.embed

    def overflowing(batch: torch.Tensor) -> torch.Tensor:
        found = embed(batch).clone()
        found[(batch == 255).flatten(1).all(dim=1)] = torch.nan
        return found

    monkeypatch.setattr(worker._network, "embed", overflowing)
    rows = worker(
        pa.table({"image_id": ["a", "b"], "attempt": [1, 2], "image": [encode_picture(image) for image in images]})
    ).to_pylist()
    assert [(row["status"], row["attempt"], len(row["values"])) for row in rows] == [("ok", 1, 2048), ("error", 2, 0)]
    assert rows[1]["error"] == "expected finite features, found a NaN or infinity"
