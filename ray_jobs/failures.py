"""From any error, ours or Ray's, to the one line and the exit code that a person sees."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence

from safetydpo.errors import SafetyDPOError, UsageError, visible

INTERRUPTED = 130
DEBUG = "--debug"
AGAIN = "then run the same command again"
# Ray hands some errors on as text only: the traceback of a worker, whose last line of ours is the one to show.
_OURS = re.compile(r"^\s*safetydpo\.errors\.(SafetyDPOError|UsageError): (.+)$", re.MULTILINE)
_FULL_DISK = re.compile(r"No space left on device|Disk quota exceeded|disk is full", re.IGNORECASE)
_S3_ERROR = re.compile(r"[^\n:]*: AWS Error [^\n]*")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LAST_LINE = re.compile(r"^[\w.]+(Error|Exception)\b.*", re.MULTILINE)
_MAX_LENGTH = 900


def split_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Return the arguments without `--debug`, and whether it was among them; with it, workers' logs are shown too.

    It is taken anywhere, because people add it to the command that just failed.
    """
    if DEBUG not in arguments:
        return list(arguments), False
    os.environ["SAFETYDPO_WORKER_LOGS"] = "1"
    return [argument for argument in arguments if argument != DEBUG], True


def run_guarded(work: Callable[[], object], *, debug: bool) -> int:
    """Run a command's work; print one line if it fails (after the traceback with `debug`); return the exit code."""
    if os.environ.get("RAY_JOB_STOP_SIGNAL") == "SIGINT":
        # A job that is stopped by it must hear it, though whoever started the cluster may have had it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # the last stop: whatever arrives here is told to the user and ends the command
        if debug:
            traceback.print_exception(error)
        told = explain(error)
        print(f"error: {told}", file=sys.stderr)
        return told.exit_code
    return 0


def explain(error: BaseException) -> SafetyDPOError:
    """Return what a person should read of `error`: expected, found, what to do, in one line.

    An error of ours wins wherever it stands: in the chain of causes, in the failure of a Ray worker, or in the
    traceback that Ray hands on as text. Otherwise the line says what the system said.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, SafetyDPOError):
            return type(cause)(_one_line(str(cause)))
    text = _COLOURS.sub("", "\n".join(str(cause) for cause in causes))
    ours = _OURS.search(text)
    if ours:
        kind = UsageError if ours[1] == "UsageError" else SafetyDPOError
        return kind(_one_line(ours[2]))
    names = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    return SafetyDPOError(_one_line(_system_message(causes, names, text)))


def _system_message(causes: list[BaseException], names: set[str], text: str) -> str:
    # Here, not above: `--help` need not load the libraries behind it.
    from safetydpo.artifacts.object_store import one_line, s3_remedy

    last = causes[-1]
    full = any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes)
    if full or names & {"OutOfDiskError"} or _FULL_DISK.search(text):
        where = getattr(last, "filename", None)
        # Ray puts its own remarks on retries where the path belongs.
        place = f" at {where}" if isinstance(where, str) and os.path.isabs(where) else ""
        return (
            f"expected room for what this stage writes, found a full disk{place} (No space left on device): "
            f"free space or set another execution.store, {AGAIN}"
        )
    remedy = s3_remedy(text)
    if remedy is not None:
        told = _S3_ERROR.search(text)
        said = one_line(OSError(told[0])) if told else _found(last)
        return f"expected an answer from the object store of execution.store, found: {said}; {remedy}, {AGAIN}"
    if names & {"OutOfMemoryError", "ObjectStoreFullError", "MemoryError"}:
        return (
            f"expected enough memory, found {_found(last)}: lower execution.num_workers or "
            f"identity.sampler.batch_size, {AGAIN}"
        )
    unreachable = names & {"RuntimeEnvSetupError", "AuthenticationError", "LocalRayletDiedError"}
    # Ray's answer to a wrong address is the plain class; its children come from elsewhere.
    if unreachable or type(last) is ConnectionError:
        return (
            f"expected a Ray cluster that answers, found {_found(last)}: check execution.ray_address, the cluster and "
            f"its token, {AGAIN}"
        )
    if names & {"WorkerCrashedError", "RayActorError", "NodeDiedError", "ObjectLostError"}:
        return (
            f"expected the workers to live, found {_found(last)}: {AGAIN.removeprefix('then ')}, which goes on from "
            "here; with --debug before it, the workers' logs are shown"
        )
    return (
        f"expected this command to finish, found {_found(last)}: run it again with --debug to see where; "
        "what is finished is kept"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and what is behind it, outermost first: Ray's own wrappers, then Python's chain."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        inner = list(_inner(current))
        # Ray makes a class that is both its own error and the worker's; its text is a whole traceback.
        if not (inner and isinstance(current, SafetyDPOError)):
            yield current
        waiting += inner


def _inner(error: BaseException) -> Iterator[BaseException]:
    failures = getattr(error, "worker_failures", None)
    candidates = [
        getattr(error, "cause", None),
        getattr(error, "controller_failure", None),
        getattr(error, "_base_exc", None),
        *(failures.values() if isinstance(failures, Mapping) else ()),
        error.__cause__ if not isinstance(error, SafetyDPOError) else None,
    ]
    # Ray Data raises its errors "from SystemException()", an empty mark that explains nothing.
    yield from (item for item in candidates if isinstance(item, BaseException) and str(item))


def _found(error: BaseException) -> str:
    text = _COLOURS.sub("", str(error)).strip()
    if "\n" in text:
        # A traceback: its last line that names an error; else the first line, which says what happened.
        named = list(_LAST_LINE.finditer(text))
        text = named[-1][0] if named else text.splitlines()[0]
    name = type(error).__name__
    line = _one_line(text)
    return line if line.startswith(name) or "Error: " in line else f"{name}: {line}" if line else name


def _one_line(text: str) -> str:
    line = visible(" ".join(_COLOURS.sub("", text).split()))
    return line if len(line) <= _MAX_LENGTH else f"{line[:_MAX_LENGTH]} …"
