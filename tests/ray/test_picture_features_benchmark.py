"""The benchmark of picture features, on one batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest
import torch

from benchmarks import picture_features


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """The benchmark sets torch's threads for its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_worker_and_loop_measure_the_same_pictures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["picture_features", "--pictures", "64", "--rounds", "1"])
    picture_features.main()
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["benchmark"] == "picture_features"
    assert printed["raw"]["pictures"] == 64
    assert printed["ratios"]["worker_vs_hand_batched"] > 0
