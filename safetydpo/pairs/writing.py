"""Ask a writer until every concept has its pairs: bounded concurrency, answers handled as they come."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from safetydpo.errors import SafetyDPOError
from safetydpo.pairs.ledger import Ledger
from safetydpo.pairs.writers import PromptWriter, Reply, UnansweredError, WriteRequest

MAX_ROUNDS = 3
"""How often a request that stayed without an answer (after its own retries) is put back at the end of the queue."""

RequestKey = tuple[str, int]
"""(key of the concept, attempt)"""


@dataclass(frozen=True)
class Unanswered:
    """A request that never got its answer, and what was found instead."""

    request: WriteRequest
    error: str


async def ask_writer(
    writer: PromptWriter,
    ledger: Ledger,
    *,
    known: Mapping[RequestKey, Reply],
    concurrency: int,
    handle: Callable[[WriteRequest, Reply, bool], None],
) -> list[Unanswered]:
    """Answer every request of the ledger, from `known` or by the writer; return those that stayed unanswered.

    Args:
        writer: Who is asked; never more than `concurrency` times at once.
        ledger: Says what to ask.
        known: Answers of an earlier run; they are not asked again.
        concurrency: At least 1.
        handle: Takes each answer as it comes, and whether it is new; has to enter it into the ledger.

    Raises:
        SafetyDPOError: if the writer can never answer, or so many requests in a row stayed unanswered that it must be
            down. Answers that came before were handled.
    """
    waiting: deque[WriteRequest] = deque()
    running: dict[asyncio.Task[Reply], WriteRequest] = {}
    rounds: Counter[RequestKey] = Counter()
    unanswered: list[Unanswered] = []
    num_in_a_row = 0
    _plan(ledger, known, waiting, handle)
    try:
        while waiting or running:
            while waiting and len(running) < concurrency:
                request = waiting.popleft()
                running[asyncio.create_task(writer.write(request))] = request
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            # Answers first: an error in the same moment must not cost what was paid for.
            for task in sorted(done, key=lambda task: task.exception() is not None):
                request = running.pop(task)
                error = task.exception()
                if error is None:
                    num_in_a_row = 0
                    handle(request, task.result(), True)
                elif isinstance(error, UnansweredError):
                    num_in_a_row += 1
                    _check_alive(num_in_a_row, concurrency, error)
                    key = (request.concept.key, request.attempt)
                    rounds[key] += 1
                    if rounds[key] < MAX_ROUNDS:
                        waiting.append(request)
                    else:
                        unanswered.append(Unanswered(request, str(error)))
                else:
                    raise error
            _plan(ledger, known, waiting, handle)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return unanswered


def _plan(
    ledger: Ledger,
    known: Mapping[RequestKey, Reply],
    waiting: deque[WriteRequest],
    handle: Callable[[WriteRequest, Reply, bool], None],
) -> None:
    while requests := ledger.take_requests():
        for request in requests:
            reply = known.get((request.concept.key, request.attempt))
            if reply is None:
                waiting.append(request)
            else:
                handle(request, reply, False)


def _check_alive(num_in_a_row: int, concurrency: int, error: UnansweredError) -> None:
    limit = max(5, 2 * concurrency)
    if num_in_a_row >= limit:
        raise SafetyDPOError(
            f"expected the writer to answer, found {limit} requests in a row without an answer (last: {error}): see "
            "to the server, then run the same command again; what is answered is kept"
        ) from error
