from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from safetydpo.artifacts.latents import latent_deviations, latent_means
from safetydpo.artifacts.schemas import LATENTS
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table, table_from_rows, write_table
from safetydpo.errors import SafetyDPOError

MEAN = np.arange(8, dtype=np.float16).reshape(2, 2, 2)


def row(name: str, **changes: object) -> dict[str, object]:
    shape = dict(zip(("channels", "height", "width"), MEAN.shape, strict=True))
    return {"image_id": name, "latent": MEAN.tobytes(), "deviation": None, **shape, **changes}


def test_both_moments_come_back():
    table = table_from_rows([row("a", deviation=(MEAN / 2).tobytes())], LATENTS)
    assert np.array_equal(latent_means(table)["a"], MEAN)
    assert np.array_equal(latent_deviations(table)["a"], MEAN / 2)
    assert latent_deviations(table)["a"].dtype == np.float16


def test_a_table_from_before_there_were_deviations_is_read(store: Location):
    """Its rows have a mean; asking for the deviation says what to do."""
    before = pa.schema([field for field in LATENTS if field.name not in ("deviation", "micro_batch")])
    content = {name: value for name, value in row("a").items() if name != "deviation"}
    write_table(store / "old.parquet", table_from_rows([content], before))
    write_table(store / "new.parquet", table_from_rows([row("b", deviation=MEAN.tobytes())], LATENTS))
    table = read_table(store, LATENTS)
    assert table.schema == LATENTS
    assert set(latent_means(table)) == {"a", "b"}
    assert table.column("deviation").null_count == 1
    assert read_table(store / "old.parquet", LATENTS, columns=["image_id", "deviation"]).to_pylist() == [
        {"image_id": "a", "deviation": None}
    ]
    with pytest.raises(
        SafetyDPOError,
        match=r"expected a deviation with the latents of picture a, found the mean only: set "
        r"identity\.pairs\.latents=mean_and_deviation and make the pairs again",
    ):
        latent_deviations(table)


def test_only_columns_that_were_added_later_may_be_absent(store: Location):
    before = pa.schema([field for field in LATENTS if field.name != "width"])
    content = {name: value for name, value in row("a").items() if name != "width"}
    write_table(store / "old.parquet", table_from_rows([content], before))
    with pytest.raises(SafetyDPOError, match="expected columns .* in .*, found no 'width'"):
        read_table(store / "old.parquet", LATENTS)


def test_bytes_that_do_not_fit_are_refused():
    table = table_from_rows([row("a", width=3)], LATENTS)
    with pytest.raises(SafetyDPOError, match=r"expected latent of shape \[2, 2, 3\] for picture a, found 8 numbers"):
        latent_means(table)
