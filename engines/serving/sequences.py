"""The continuation of a prompt, the request it belongs to, and what happens to it."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coatrt.engines.runtime.sampling import Sampler, Sampling, largest, log_probabilities
from coatrt.engines.runtime.text_stream import TextStream
from coatrt.engines.serving.errors import ApiError
from coatrt.engines.serving.rows import RowsLora

__all__ = ["Continuation", "End", "Entry", "Event", "Job", "Step", "common_prefix", "expired"]


@dataclass(frozen=True)
class Entry:
    """The log probabilities at a token: its own, and those of the likeliest, as (token, log probability)."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]
    offset: int
    """Complete characters of the text before the token."""


@dataclass(frozen=True)
class Step:
    """A generated token: the text that it completes, and its log probabilities if wanted."""

    text: str
    entry: Entry | None


@dataclass(frozen=True)
class End:
    """The end of a sequence: the text that was held back, and why it ends."""

    text: str
    reason: Literal["stop", "length"]
    tokens: int
    """Generated ones."""
    cached: int
    """Tokens of the prompt that were in a cache."""


Event = Step | End | ApiError


@dataclass(eq=False)
class Job:
    """A request at work: its continuations share a deadline, and end together if the client leaves.

    Args:
        arrival: when it came, as `time.monotonic` counts.
        deadline: when it must have ended.
        emit: called from other threads with (index of the choice, event).
    """

    arrival: float
    deadline: float
    emit: Callable[[int, Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    left: int = 0
    """Continuations that have not ended."""
    started: bool = False
    """Whether one has left the queue."""


@dataclass(eq=False)
class Continuation:
    """The continuation of a prompt, from the queue to its end.

    Args:
        job: the request.
        index: number of its choice.
        prompt: tokens.
        lora: to run it with.
        sampling: how tokens are chosen.
        draws: number that tells the random draws of sequences with an equal seed apart.
        text: makes text of its tokens.
        ends: tokens that end it.
        most: largest number of new tokens.
        logprobs: alternatives at each token; None for no log probabilities.
    """

    job: Job
    index: int
    prompt: tuple[int, ...]
    lora: RowsLora
    sampling: Sampling
    draws: int
    text: TextStream
    ends: frozenset[int]
    most: int
    logprobs: int | None
    generated: int = 0
    """New tokens so far, without the end token."""
    cached: int = 0
    """Tokens of the prompt that were in a cache."""
    begun: bool = False
    """Whether its prompt is being computed."""
    events: list[Event] = field(default_factory=list)
    """What has not been emitted yet."""

    def __post_init__(self) -> None:
        self._sampler = Sampler(self.sampling, self.prompt, self.draws)

    def take(self, logits: NDArray[np.float32]) -> int | None:
        """Choose a token and note what it brings; return None if it ends the sequence.

        Raises:
            BundleError: the logits are not finite.
        """
        token = self._sampler.next(logits)
        if token in self.ends:
            self.finish("stop")
            return None
        self.generated += 1
        entry = None if self.logprobs is None else self._entry(logits, token)
        self.events.append(Step(self.text.push(token), entry))
        if self.text.stopped:
            self.finish("stop")
        elif self.generated >= self.most:
            self.finish("length")
        else:
            return token
        return None

    def _entry(self, logits: NDArray[np.float32], token: int) -> Entry:
        assert self.logprobs is not None
        values = log_probabilities(logits)
        top = largest(values, self.logprobs) if self.logprobs else ()
        likeliest = tuple((int(other), float(values[other])) for other in top)
        return Entry(token, float(values[token]), likeliest, self.text.characters)

    def finish(self, reason: Literal["stop", "length"]) -> None:
        """Note the end."""
        text = self.text.close()
        if self.text.stopped:
            reason = "stop"
        self.events.append(End(text, reason, self.generated, self.cached))

    def flush(self) -> None:
        """Emit what has been noted."""
        events, self.events = self.events, []
        for event in events:
            self.job.emit(self.index, event)


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the number of equal elements at the beginning."""
    limit = min(len(a), len(b))
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def expired(job: Job) -> bool:
    """Return whether a request has run out of time."""
    return time.monotonic() > job.deadline
