"""Is there a token to send. Without Ray, so that it is told before Ray is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetydpo.errors import UsageError


def check_token(environment: Mapping[str, str] = os.environ) -> None:
    """See that a token is there if this machine is told to send one; Ray would say so after 20 s, in other words.

    Raises:
        UsageError: if there is none.
    """
    if environment.get("RAY_AUTH_MODE", "").lower() != "token" or environment.get("RAY_AUTH_TOKEN"):
        return
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path(environment.get("HOME", "~")) / ".ray" / "auth_token")
    if not (path.expanduser().is_file() and path.expanduser().stat().st_size):
        raise UsageError(
            f"expected a token at {path} (RAY_AUTH_MODE is token), found none: copy the cluster's there, mode 600, "
            "or unset RAY_AUTH_MODE for a cluster without one"
        )
