"""Which requests a writer still has to answer, and which of its pairs are kept: a function of the answers alone.

Answers come in any order, from any number of connections, some of them read back after a kill. Verdicts must not depend
on that. So every well-formed pair has a position (attempt, concept, line), and of equal texts the one at the smallest
position is kept, whenever it arrives. Whatever arrives later can only take pairs away from a concept: a concept that
looks short is short, and its next request can be asked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from safetydpo.errors import UsageError
from safetydpo.pairs.writer_replies import Candidate, ParsedReply, Reason, Reject
from safetydpo.pairs.writers import WriteRequest
from safetydpo.prompts.concepts import ConceptEntry

MAX_TOLD = 20
"""Existing texts that a top-up request is told at most; more would cost more than the duplicates they avoid."""

Position = tuple[int, str, int]
"""(attempt, key of the concept, line)"""


@dataclass(frozen=True)
class Verdict:
    """One pair or rejected line of an answer: its attempt, and why it is not kept (None: it is)."""

    attempt: int
    line: int
    reason: Reason | None
    candidate: Candidate | None
    text: str


@dataclass
class _Progress:
    concept: ConceptEntry
    num_asked: int = 0
    replies: dict[int, ParsedReply] = field(default_factory=dict)


class Ledger:
    """The books of one run."""

    def __init__(
        self,
        concepts: Sequence[ConceptEntry],
        *,
        pairs_per_concept: int,
        pairs_per_request: int,
        max_requests: int,
    ) -> None:
        """Open the books.

        Args:
            concepts: What pairs are written about, each key once.
            pairs_per_concept: How many are wanted.
            pairs_per_request: How many a request asks for.
            max_requests: How often a concept is asked about at most; then it is short.

        Raises:
            UsageError: if even full answers could not fill a concept within `max_requests`.
        """
        self._num_planned = -(-pairs_per_concept // pairs_per_request)
        if max_requests < self._num_planned:
            raise UsageError(
                f"expected room for {pairs_per_concept} pairs per concept, found at most {max_requests} requests of "
                f"{pairs_per_request} pairs: allow at least {self._num_planned} requests, or ask for fewer pairs"
            )
        self._wanted = pairs_per_concept
        self._per_request = min(pairs_per_request, pairs_per_concept)
        self._max_requests = max_requests
        self._progress = {concept.key: _Progress(concept) for concept in concepts}
        self._first: dict[str, Position] = {}
        self._touched = list(self._progress)

    def take_requests(self) -> list[WriteRequest]:
        """Return the requests that have become necessary since the last call; each is returned once."""
        requests: list[WriteRequest] = []
        for key in dict.fromkeys(self._touched):
            progress = self._progress[key]
            while self._needs_another(progress):
                requests.append(self._next_request(progress))
        self._touched = []
        return requests

    def add(self, request: WriteRequest, parsed: ParsedReply) -> None:
        """Enter the answer to a request."""
        key = request.concept.key
        self._progress[key].replies[request.attempt] = parsed
        self._touched.append(key)
        for candidate in parsed.candidates:
            position = (request.attempt, key, candidate.line)
            before = self._first.get(candidate.key)
            if before is None or position < before:
                self._first[candidate.key] = position
                if before is not None:
                    self._touched.append(before[1])

    def num_kept(self, key: str) -> int:
        """Return how many pairs of a concept are kept, at most as many as are wanted."""
        return min(self._wanted, sum(1 for _ in self._firsts(self._progress[key])))

    def is_short(self, key: str) -> bool:
        """Return whether fewer pairs of a concept are kept than are wanted."""
        return self.num_kept(key) < self._wanted

    def kept(self, key: str) -> list[Candidate]:
        """Return a concept's kept pairs in order of attempt and line."""
        return [item.candidate for item in self.verdicts(key) if item.candidate is not None and item.reason is None]

    def verdicts(self, key: str) -> list[Verdict]:
        """Return the verdict on every line of a concept's answers, in order of attempt and line."""
        progress = self._progress[key]
        kept = set(self._firsts(progress)[: self._wanted])
        found: list[Verdict] = []
        for attempt, parsed in sorted(progress.replies.items()):
            items: list[Candidate | Reject] = sorted((*parsed.candidates, *parsed.rejects), key=lambda item: item.line)
            found += [self._judge(attempt, item, key, kept) for item in items]
        return found

    def _needs_another(self, progress: _Progress) -> bool:
        if progress.num_asked < self._num_planned:
            return True
        all_answered = len(progress.replies) == progress.num_asked
        return all_answered and progress.num_asked < self._max_requests and len(self._firsts(progress)) < self._wanted

    def _next_request(self, progress: _Progress) -> WriteRequest:
        attempt = progress.num_asked
        progress.num_asked += 1
        # Texts of the concept's own answers only: others' depend on what has come by now.
        texts = [
            candidate.unsafe_text for _, parsed in sorted(progress.replies.items()) for candidate in parsed.candidates
        ]
        return WriteRequest(
            concept=progress.concept,
            attempt=attempt,
            num_pairs=self._per_request,
            avoid=tuple(dict.fromkeys(texts))[-MAX_TOLD:] if attempt >= self._num_planned else (),
        )

    def _firsts(self, progress: _Progress) -> list[Position]:
        return [
            position
            for attempt, parsed in sorted(progress.replies.items())
            for candidate in parsed.candidates
            if self._first[candidate.key] == (position := (attempt, progress.concept.key, candidate.line))
        ]

    def _judge(self, attempt: int, item: Candidate | Reject, key: str, kept: set[Position]) -> Verdict:
        if isinstance(item, Reject):
            return Verdict(attempt, item.line, item.reason, None, item.text)
        position = (attempt, key, item.line)
        reason = None
        if self._first[item.key] != position:
            reason = Reason.DUPLICATE
        elif position not in kept:
            reason = Reason.SURPLUS
        return Verdict(attempt, item.line, reason, item, item.unsafe_text)
