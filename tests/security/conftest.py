from __future__ import annotations

from tests.ray.conftest import command, configs  # noqa: F401 (fixtures)
