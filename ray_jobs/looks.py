"""When the workers of a lane look up from their steps, to see whether their machine is about to be taken away.

Google gives 30 s from its notice to the end. Of these go up to 7 s until the spot watcher knows of it, 3 s until Ray
does, 5 s until Ray Train's own watcher has told the workers; what is left must do for the look, the step under way and
the checkpoint. A step of a large model takes seconds, so that looks are counted in seconds and not in steps.
"""

from __future__ import annotations

import time

LOOK_SECONDS = 3.0
"""Between two looks, or one step if that takes longer."""
MOST_STEPS = 10
"""Between two looks: more would save nothing, and one of steps that have become slow must not be far away."""


class Looks:
    """Says after which steps a worker looks; all workers of a lane do so after the same ones."""

    def __init__(self, *, is_alone: bool) -> None:
        """Look after the first step. A worker that `is_alone` may look by the clock, too: it need not agree."""
        self._is_alone = is_alone
        self.begin(1)

    def begin(self, steps: int) -> None:
        """Count from here: the next look is `steps` steps away."""
        self._steps = self._left = steps
        self._since = time.monotonic()

    def is_due(self) -> bool:
        """Count a step; return whether to look after it."""
        self._left -= 1
        return self._left <= 0 or (self._is_alone and time.monotonic() - self._since >= LOOK_SECONDS)

    def next_steps(self) -> int:
        """Return how many steps away the next look should be, from what those since the last one took.

        Whatever else took time since then, such as a validation, counts as theirs: it errs towards looking sooner.
        """
        seconds = (time.monotonic() - self._since) / (self._steps - self._left)
        return max(1, min(MOST_STEPS, int(LOOK_SECONDS / max(seconds, 1e-6))))
