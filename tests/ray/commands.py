"""Run the `safetydpo` command in this process and look at what a person would see."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ray_jobs import cli


@dataclass(frozen=True)
class Seen:
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str

    def assert_one_line(self, *parts: str, code: int) -> None:
        """One line that says expected, found and what to do; no traceback."""
        assert self.code == code, self.err
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.out + self.err
        for part in ("expected", "found", *parts):
            assert part in self.err


@dataclass(frozen=True)
class Command:
    """The command with a store and a run folder of its own."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    config: Path
    folder: Path

    @property
    def places(self) -> list[str]:
        """The settings that every run of a test gets."""
        return [f"store={self.folder}/store", f"run_dir={self.folder}/run"]

    def __call__(self, stage: str, *settings: str, before: tuple[str, ...] = ()) -> Seen:
        """Run `safetydpo BEFORE STAGE configs/smoke.yaml SETTINGS` and return what it did."""
        return self.raw(*before, stage, str(self.config), *self.places, *settings)

    def raw(self, *arguments: str) -> Seen:
        """Run `safetydpo ARGUMENTS`."""
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "argv", ["safetydpo", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = self.capsys.readouterr()
        return Seen(int(caught.value.code or 0), output.out, output.err)
