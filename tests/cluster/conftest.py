from __future__ import annotations

from collections.abc import Iterator

import pytest

from safetydpo.artifacts.storage import Location
from tests.cluster.metadata_server import Server, metadata_server


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest) -> Location:
    """An empty folder of either kind."""
    found: Location = request.getfixturevalue({"disk": "store", "s3": "s3_store"}[request.param])
    return found


@pytest.fixture
def server() -> Iterator[Server]:
    """What a machine's metadata service would be."""
    with metadata_server() as made:
        yield made
