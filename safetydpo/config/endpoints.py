"""Addresses of OpenAI-compatible servers."""

from __future__ import annotations

from urllib.parse import urlsplit

from safetydpo.errors import UsageError


def checked_base_url(base_url: str, *, what: str, key_setting: str) -> str:
    """Return `base_url` if a client can use it and it holds no key.

    Args:
        base_url: such as `http://localhost:8000/v1`.
        what: how the message calls it.
        key_setting: where the name of the variable with the key belongs.

    Raises:
        UsageError: if it is none, or holds a user name, password, query or fragment.
    """
    # Such an address may hold a key, so that no message repeats it before this is ruled out.
    if any(sign in base_url for sign in "@?#"):
        raise UsageError(
            f"expected {what} without a user name, password, query or fragment, found one: keys come from an "
            f"environment variable ({key_setting})"
        )
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(f"expected {what} such as http://localhost:8000/v1, found {base_url!r}: correct it")
    return base_url
