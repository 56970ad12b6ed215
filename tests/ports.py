"""Free ports on loopback that nobody is given by chance before a server takes them."""

from __future__ import annotations

import random
import socket

FIRST, LAST = 20_000, 32_767
"""Above the ports that Ray keeps for its workers (10002 to 19999), below those that the system gives to whoever
connects somewhere (32768 to 60999): one of these could be gone before its server has started."""


def free_ports(count: int) -> list[int]:
    """`count` different ports that nobody uses now; other processes of the tests draw others."""
    found: list[int] = []
    # Not the generator that tests seed: two of their processes would draw the same ports.
    draw = random.SystemRandom()
    while len(found) < count:
        port = draw.randint(FIRST, LAST)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
