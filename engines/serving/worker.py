"""One thread that computes some rows: prompts in chunks, and one token of all rows at once between them."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coatrt.engines.serving.errors import ApiError, stopping, time_limit
from coatrt.engines.serving.metrics import Metrics
from coatrt.engines.serving.rows import Rows, RowsLora
from coatrt.engines.serving.sequences import Continuation, common_prefix, expired
from coatrt.errors import CoatError

__all__ = ["Slot", "Worker"]

# A chunk of a prompt delays the rows that decode; SmolLM2-135M computes 32 tokens in about 0.1 s on one core.
_CHUNK_BETWEEN_STEPS = 32
_CHUNK_ALONE = 256

_log = logging.getLogger("coatrt.serve")


@dataclass(eq=False)
class Slot:
    """A row: the tokens whose keys and values it has, with which LoRA, and the continuation that uses it."""

    row: int
    tokens: list[int] = field(default_factory=list)
    lora: RowsLora | None = None
    busy: Continuation | None = None
    next: int | None = None
    """Token that the next step appends; None while the prompt is not computed."""
    used: int = 0
    """When it was taken last, as a count."""

    def match(self, work: Continuation) -> int:
        """Return how many tokens of a prompt it has; the last one is computed anew, for its logits."""
        return common_prefix(self.tokens, work.prompt[:-1]) if self.lora is work.lora else 0


class Worker(threading.Thread):
    """Computes rows.

    Args:
        rows: whose caches they are.
        count: number of rows.
        changed: lock of the scheduler, notified when there is work.
        freed: called, with the lock, when a row is free.
        metrics: counts tokens.
        seconds: time limit of a request, for the message.
    """

    def __init__(
        self,
        rows: Rows,
        count: int,
        changed: threading.Condition,
        freed: Callable[[], None],
        metrics: Metrics,
        seconds: float,
    ) -> None:
        super().__init__(daemon=True, name="coatrt-rows")
        self.slots = [Slot(row) for row in range(count)]
        self.ended = False
        self._rows, self._changed, self._freed, self._metrics, self._seconds = rows, changed, freed, metrics, seconds
        self._prompts: list[Slot] = []  # rows whose prompt is not computed yet, first come first served

    @property
    def active(self) -> list[Slot]:
        """Rows in use."""
        return [slot for slot in self.slots if slot.busy is not None]

    def start_row(self, slot: Slot, work: Continuation) -> None:
        """Give a row to a continuation; the caller has the lock."""
        slot.busy, slot.next = work, None
        self._prompts.append(slot)
        self._changed.notify_all()

    def run(self) -> None:
        """Compute until `ended`."""
        while True:
            with self._changed:
                while not (self.ended or self.active):
                    self._changed.wait()
                if self.ended:
                    for slot in self.active:
                        self._end(slot, stopping())
                    return
                active = self.active
            for slot in active:
                self._drop_if_over(slot)
            try:
                self._turn()
            except Exception as error:
                self._fail(error)

    def _turn(self) -> None:
        """Decode one token of each row, then compute a chunk of one prompt."""
        decoding = [slot for slot in self.slots if slot.next is not None]
        for lora in dict.fromkeys(slot.lora for slot in decoding):
            assert lora is not None
            group = {slot.row: slot for slot in decoding if slot.lora is lora}
            tokens = {row: slot.next for row, slot in group.items() if slot.next is not None}
            logits = self._rows.step(tokens, lora)
            for row, slot in group.items():
                slot.tokens.append(tokens[row])
                self._take(slot, logits[row])
        with self._changed:
            first = self._prompts[0] if self._prompts else None
        if first is not None and first.busy is not None:
            self._read_prompt(first, first.busy, _CHUNK_BETWEEN_STEPS if decoding else _CHUNK_ALONE)

    def _read_prompt(self, slot: Slot, work: Continuation, chunk: int) -> None:
        """Compute the next tokens of a prompt; before the first ones, find what is in a cache already."""
        if not work.begun:
            self._reuse(slot, work)
        done = len(slot.tokens)
        part = work.prompt[done : done + chunk]
        logits = self._rows.extend(slot.row, part, work.lora)
        slot.tokens.extend(part)
        self._metrics.prompt_tokens(len(part))
        if len(slot.tokens) == len(work.prompt):
            with self._changed:
                self._prompts.remove(slot)
            self._take(slot, logits)

    def _reuse(self, slot: Slot, work: Continuation) -> None:
        """Keep what the row, or copy what another row has of a prompt."""
        best = max(self.slots, key=lambda other: (other.match(work), other is slot))
        count = best.match(work)
        if best is not slot and not (count > slot.match(work) and self._rows.copy(best.row, slot.row, count)):
            count = slot.match(work)
        self._rows.lengths[slot.row] = count
        slot.tokens, slot.lora = list(work.prompt[:count]), work.lora
        work.cached, work.begun = count, True
        self._metrics.cached_tokens(count)

    def _take(self, slot: Slot, logits: NDArray[np.float32]) -> None:
        """Choose the next token of a row; end the row if that ends the continuation."""
        work = slot.busy
        assert work is not None
        before = work.generated
        try:
            token = work.take(logits)
        except CoatError as error:  # the logits are not finite, so neither are the caches
            slot.tokens, self._rows.lengths[slot.row] = [], 0
            self._end(slot, ApiError(str(error), 500))
            return
        self._metrics.tokens(work.generated - before)
        if work.generated == 1 and before == 0:
            self._metrics.first_token(time.monotonic() - work.job.arrival)
        if token is None:
            self._end(slot)
        else:
            slot.next = token
            work.flush()

    def _drop_if_over(self, slot: Slot) -> None:
        work = slot.busy
        if work is not None and work.job.cancelled.is_set():
            self._end(slot)
        elif work is not None and expired(work.job):
            self._end(slot, time_limit(self._seconds))

    def _end(self, slot: Slot, error: ApiError | None = None) -> None:
        """Free a row, then tell the client."""
        with self._changed:
            work, slot.busy, slot.next = slot.busy, None, None
            if slot in self._prompts:
                self._prompts.remove(slot)
            if work is not None:
                work.job.left -= 1
            self._freed()
        if work is not None:
            if error is not None:
                work.events.append(error)
            work.flush()

    def _fail(self, error: Exception) -> None:
        """End all rows after an error, whose cause is logged; nothing of their caches is used again."""
        if isinstance(error, CoatError):
            _log.error("%s", error)
        else:
            _log.exception("a step failed")
        for slot in self.slots:
            slot.tokens, slot.lora = [], None
            self._rows.lengths[slot.row] = 0
            if slot.busy is not None:
                self._end(slot, ApiError("the server failed; its log says why", 500))
