"""Train functions of the trainer tests; in a module of their own, so that Ray's workers can import them."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetydpo.errors import SafetyDPOError, UsageError


def attempt(settings: Mapping[str, Any]) -> None:
    """Leave a file per call, then do what `settings["end"]` says."""
    folder = Path(settings["folder"])
    (folder / uuid.uuid4().hex).touch()
    if settings["end"] == "failure":
        raise SafetyDPOError("expected light, found none: switch it on")
    if settings["end"] == "usage":
        raise UsageError("expected a switch, found none: name one")
    if settings["end"] == "die once" and len(list(folder.iterdir())) == 1:
        # A worker that dies while Ray Train is still handing it its work ends the run: no failure limit covers that.
        time.sleep(5)
        os._exit(1)
