"""Threads that wait for Ray, and the end of a process in which one still does.

Ray's core ends the process at once, with exit code 1 and without a word, if a thread asks it anything after its
shutdown. A thread that waits for a lane cannot be told to stop, so that a command which ends before its lanes do (by
Ctrl-C, or because one of them failed) leaves Ray alone and ends itself; Ray's processes then end with it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

_GRACE_SECONDS = 0.2
_threads: list[threading.Thread] = []


def in_background(work: Callable[..., object], *arguments: object) -> None:
    """Call `work` in a thread that may wait for Ray as long as it likes."""
    # A daemon: Ctrl-C reaches the main thread alone, which must not wait for lanes that lost their Ray.
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    _threads.append(thread)
    thread.start()


def is_ray_waited_for() -> bool:
    """Return whether such a thread is still at work."""
    for thread in _threads:
        thread.join(timeout=_GRACE_SECONDS)
    return any(thread.is_alive() for thread in _threads)


def end_process(code: int) -> NoReturn:
    """End this process with this exit code, whatever its threads do."""
    if is_ray_waited_for():
        from ray_jobs.state_folder import remove_open_folders

        remove_open_folders()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not `sys.exit`, which would have Ray shut down beneath them.
        os._exit(code)
    sys.exit(code)
