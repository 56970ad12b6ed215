"""What a comparator is tuned over: its settings, those that are tried first, and seeded draws of the others (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from safetydpo.errors import UsageError
from safetydpo.seeding import derive_numpy

Settings = Mapping[str, float | str]


@dataclass(frozen=True)
class Range:
    """A number between two ends, both included."""

    low: float
    high: float
    log: bool = False
    """Drawn evenly in its logarithm."""
    whole: bool = False
    """A whole number."""

    def draw(self, generator: np.random.Generator) -> float:
        """Return a value, rounded to four digits so that it can be written down as it was used."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + (high - low) * float(generator.random())
        value = math.exp(value) if self.log else value
        return float(round(value)) if self.whole else float(f"{value:.4g}")

    def holds(self, value: float | str) -> bool:
        """Return whether a value is one of these."""
        if isinstance(value, str) or not self.low <= value <= self.high:
            return False
        return not self.whole or value == int(value)

    def __str__(self) -> str:
        return f"{'a whole number' if self.whole else 'a number'} in [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Choice:
    """One of several words."""

    values: tuple[str, ...]

    def draw(self, generator: np.random.Generator) -> str:
        """Return one of the words."""
        return self.values[int(generator.integers(len(self.values)))]

    def holds(self, value: float | str) -> bool:
        """Return whether a value is one of these."""
        return value in self.values

    def __str__(self) -> str:
        return f"one of {', '.join(self.values)}"


@dataclass(frozen=True)
class Space:
    """The settings of one comparator."""

    settings: Mapping[str, Range | Choice]
    first: tuple[Settings, ...]
    """Tried first, in this order: the paper's own where it names any."""
    drawn: Mapping[str, Range | Choice] | None = None
    """What the others are drawn from; settings that are missing here are those of the first. None = all `settings`."""

    def check(self, settings: Settings, *, name: str) -> None:
        """Check that these are the settings of comparator `name`, each in its range.

        Raises:
            UsageError: naming the first that is missing, unknown or out of range.
        """
        for key in sorted({*self.settings, *settings}):
            if key not in self.settings:
                raise UsageError(
                    f"expected settings {', '.join(self.settings)} of comparator {name!r}, found {key!r}: take it out"
                )
            if key not in settings:
                raise UsageError(
                    f"expected a setting {key!r} of comparator {name!r}, found none: give {self.settings[key]}"
                )
            if not self.settings[key].holds(settings[key]):
                raise UsageError(
                    f"expected {self.settings[key]} for setting {key!r} of comparator {name!r}, found "
                    f"{settings[key]!r}: correct it"
                )

    def candidates(self, count: int, *, run_seed: int, name: str) -> list[Settings]:
        """Return `count` settings: the ones that come first, then seeded draws.

        A candidate depends on its position, not on how many there are: more of them leave the first ones as they were.
        """
        found = list(self.first[:count])
        for index in range(len(found), count):
            generator = derive_numpy(run_seed, "comparator_settings", f"{name}/{index}")
            drawn = {key: one.draw(generator) for key, one in (self.drawn or self.settings).items()}
            found.append({**self.first[0], **drawn})
        return found
