"""A clock that tests turn."""

from __future__ import annotations


class TurnedClock:
    """Stands in for the module `time`: says what it is set to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def monotonic(self) -> float:
        """Return the seconds that it shows."""
        return self.now
