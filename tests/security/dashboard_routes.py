"""What the dashboard of the installed Ray answers to, as its own route tables say; run as a program it prints them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

HEAD, AGENT = "head", "agent"


def list_routes() -> dict[str, list[tuple[str, str]]]:
    """Return (method, path) of the head's dashboard and of every node's agent, without loading them here."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {part: [(method, path) for method, path in routes] for part, routes in found.items()}


def filled(path: str) -> str:
    """Return a path with something for each of its parameters."""
    return re.sub(r"\{[^}]*\}", "x", path)


def _routes_of(table: Any) -> list[tuple[str, str]]:
    from ray.dashboard.optional_deps import RouteDef

    items = table.routes()._items
    bound = [(item.method, item.path) for item in items if isinstance(item, RouteDef)]
    return bound + [("GET", f"{item.prefix}/x") for item in items if not isinstance(item, RouteDef)]


def _main() -> None:
    from ray.dashboard.http_server_head import setup_static_dir
    from ray.dashboard.optional_utils import DashboardAgentRouteTable, DashboardHeadRouteTable
    from ray.dashboard.subprocesses.module import SubprocessModule
    from ray.dashboard.subprocesses.routes import SubprocessRouteTable
    from ray.dashboard.utils import DashboardAgentModule, DashboardHeadModule, get_all_modules

    for kind in (DashboardHeadModule, SubprocessModule, DashboardAgentModule):
        get_all_modules(kind)
    setup_static_dir()
    head = _routes_of(DashboardHeadRouteTable) + _routes_of(SubprocessRouteTable)
    # The agent adds the folder of logs when it runs.
    agent = [*_routes_of(DashboardAgentRouteTable), ("GET", "/logs/x")]
    print(json.dumps({HEAD: sorted(set(head)), AGENT: sorted(set(agent))}))


if __name__ == "__main__":
    _main()
