"""What `safetydpo plan --json` tells."""

from __future__ import annotations

import json
from typing import Any

from tests.ray.commands import Command


def told(command: Command, *arguments: str) -> dict[str, Any]:
    seen = command("plan", "--json", *arguments)
    assert seen.code == 0, seen.err
    found: dict[str, Any] = json.loads(seen.out)
    return found


def stages(plan: dict[str, Any]) -> dict[str, tuple[int, int, bool]]:
    return {one["stage"]: (one["total"], one["done"], one["is_closed"]) for one in plan["stages"]}
