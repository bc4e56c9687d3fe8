"""The queue of a bundle's continuations, and which row each gets."""

import threading
import time
from collections import deque
from collections.abc import Sequence

from coatrt.engines.serving.errors import queue_full, stopping, time_limit
from coatrt.engines.serving.metrics import Metrics
from coatrt.engines.serving.rows import Rows
from coatrt.engines.serving.sequences import Continuation, Job, expired
from coatrt.engines.serving.worker import Slot, Worker

__all__ = ["Scheduler"]


class Scheduler:
    """Continuations of one bundle, first come first served.

    Args:
        rows: the rows of each worker.
        counts: how many of them each may use.
        queue: requests that may wait.
        seconds: time limit of a request.
        metrics: counts.
    """

    def __init__(
        self, rows: Sequence[Rows], counts: Sequence[int], queue: int, seconds: float, metrics: Metrics
    ) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._queue: deque[Continuation] = deque()
        self._most, self._seconds, self._clock = queue, seconds, 0
        self._stopping = False
        self._jobs: set[Job] = set()
        self.capacity = min(each.capacity for each in rows)
        self._workers = [
            Worker(each, count, self._changed, self._place, metrics, seconds)
            for each, count in zip(rows, counts, strict=True)
        ]
        for worker in self._workers:
            worker.start()

    def submit(self, job: Job, work: Sequence[Continuation]) -> None:
        """Begin a request, or queue it.

        Raises:
            ApiError: too many requests wait, or the server is stopping.
        """
        with self._changed:
            if self._stopping:
                raise stopping()
            job.left = len(work)
            self._jobs.add(job)
            self._queue.extend(work)
            self._place()
            if not job.started and self.waiting > self._most:
                self._jobs.discard(job)
                for each in work:
                    self._queue.remove(each)
                raise queue_full(self._most)

    @property
    def waiting(self) -> int:
        """Requests of which nothing has begun."""
        with self._changed:
            return sum(not job.started for job in self._jobs)

    @property
    def running(self) -> int:
        """Requests of which something has begun and not ended."""
        with self._changed:
            return sum(job.started for job in self._jobs)

    def cancel(self, job: Job) -> None:
        """End a request at its next token."""
        job.cancelled.set()
        with self._changed:
            self._place()
            self._changed.notify_all()

    def stop(self) -> None:
        """Refuse new requests and those that wait; let the others go on."""
        with self._changed:
            self._stopping = True
            for work in [work for work in self._queue if not work.job.started]:
                self._refuse(work)

    def end(self) -> None:
        """End everything."""
        self.stop()
        with self._changed:
            for work in list(self._queue):
                self._refuse(work)
            for worker in self._workers:
                worker.ended = True
            self._changed.notify_all()

    def join(self, seconds: float) -> None:
        """Wait for the threads."""
        end = time.monotonic() + seconds
        for worker in self._workers:
            worker.join(max(0.0, end - time.monotonic()))

    def _refuse(self, work: Continuation) -> None:
        self._queue.remove(work)
        work.job.left -= 1
        work.events.append(stopping())
        work.flush()
        self._forget()

    def _forget(self) -> None:
        self._jobs = {job for job in self._jobs if job.left}

    def _place(self) -> None:
        """Give free rows to the first in the queue; the caller has the lock."""
        for work in [work for work in self._queue if work.job.cancelled.is_set() or expired(work.job)]:
            self._queue.remove(work)
            work.job.left -= 1
            if not work.job.cancelled.is_set():
                work.events.append(time_limit(self._seconds))
                work.flush()
        self._forget()
        while self._queue:
            found = self._best(self._queue[0])
            if found is None:
                return
            worker, slot = found
            work = self._queue.popleft()
            work.job.started = True
            self._clock += 1
            slot.used = self._clock
            worker.start_row(slot, work)

    def _best(self, work: Continuation) -> tuple[Worker, Slot] | None:
        """Return a free row: where most of the prompt is cached, then where least runs, then the longest unused.

        A row of which the prompt would keep less than half gives way to another one, to which that part is copied.
        """
        free = [worker for worker in self._workers if len(worker.active) < len(worker.slots)]
        if not free:
            return None
        matches = {id(worker): max(slot.match(work) for slot in worker.slots) for worker in free}
        worker = max(free, key=lambda worker: (matches[id(worker)], -len(worker.active)))
        slots = [slot for slot in worker.slots if slot.busy is None]
        best = max(slots, key=lambda slot: slot.match(work))
        if best.match(work) and 2 * best.match(work) >= len(best.tokens):
            return worker, best
        return worker, min(slots, key=lambda slot: slot.used)
