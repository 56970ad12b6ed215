from __future__ import annotations

import pytest

from safetydpo.artifacts.storage import Location


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest) -> Location:
    """An empty folder of either kind."""
    found: Location = request.getfixturevalue({"disk": "store", "s3": "s3_store"}[request.param])
    return found
