"""The one process per command that outlives a training's controller to remove its placement group.

It stands on the head beside every command, so it imports no more than Ray itself.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import ray

logger = logging.getLogger(__name__)
LOOK_SECONDS = 1.0


class GroupKeeper:
    """Removes placement groups whose controllers are gone; one for all trainings of a command."""

    def __init__(self) -> None:
        self._groups: dict[str, Any] = {}
        threading.Thread(target=self._look_on, daemon=True).start()

    def keep(self, controller: str, group: Any) -> None:
        """Remember the placement group of a controller (its actor id)."""
        self._groups[controller] = group

    def _look_on(self) -> None:
        pause = threading.Event()
        while not pause.wait(LOOK_SECONDS):
            try:
                self._remove_orphans()
            except Exception as error:  # Ray's control service may be back at the next look
                logger.warning("placement groups are looked at again: %s", error)

    def _remove_orphans(self) -> None:
        for controller, group in list(self._groups.items()):
            if not _is_alive(controller):
                # A controller that ended in order has removed it already; to do so again changes nothing.
                ray.util.remove_placement_group(group)
                del self._groups[controller]


def _is_alive(actor_id: str) -> bool:
    from ray._private.state import actors

    return actors(actor_id).get("State") not in ("DEAD", None)
