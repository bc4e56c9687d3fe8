"""The queue and the rows, over rows whose logits a test can foresee: after a token t comes t + 1."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coatrt.engines.runtime.sampling import Sampling
from coatrt.engines.runtime.text_stream import TextStream
from coatrt.engines.serving.errors import ApiError
from coatrt.engines.serving.metrics import Metrics
from coatrt.engines.serving.rows import RowsLora
from coatrt.engines.serving.scheduler import Scheduler
from coatrt.engines.serving.sequences import Continuation, End, Event, Job, Step
from coatrt.errors import BundleError

VOCABULARY = 1000
LORA = RowsLora(None, None, np.dtype(np.float32))
OTHER = RowsLora(None, None, np.dtype(np.float32))


class Numbers:
    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(f"{token} " for token in tokens)


class Counting:
    """Rows that remember their calls; a gate holds them up."""

    capacity = 64

    def __init__(self, rows: int) -> None:
        self.lengths = np.zeros(rows, np.int64)
        self.calls: list[tuple[Any, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails: Exception | None = None

    def _after(self, token: int) -> NDArray[np.float32]:
        self.gate.wait()
        if self.fails is not None:
            raise self.fails
        logits = np.zeros(VOCABULARY, np.float32)
        logits[token + 1] = np.nan if token == 666 else 1
        return logits

    def extend(self, row: int, tokens: Sequence[int], lora: RowsLora) -> NDArray[np.float32]:
        self.calls.append(("extend", row, tuple(tokens)))
        self.lengths[row] += len(tokens)
        return self._after(tokens[-1])

    def step(self, tokens: Mapping[int, int], lora: RowsLora) -> dict[int, NDArray[np.float32]]:
        self.calls.append(("step", dict(tokens)))
        for row in tokens:
            self.lengths[row] += 1
        return {row: self._after(token) for row, token in tokens.items()}

    def copy(self, source: int, row: int, count: int) -> bool:
        self.calls.append(("copy", source, row, count))
        self.lengths[row] = count
        return True


class Client:
    """A request, and what it got."""

    def __init__(self, prompt: Sequence[int], most: int = 4, *, n: int = 1, seconds: float = 30, **fields: Any) -> None:
        self.events: list[list[Event]] = [[] for _ in range(n)]
        self.done = threading.Event()
        now = time.monotonic()
        self.job = Job(now, now + seconds, self._take)
        lora = fields.pop("lora", LORA)
        self.work = [
            Continuation(
                job=self.job,
                index=i,
                prompt=tuple(prompt),
                lora=lora,
                sampling=Sampling(),
                draws=i,
                text=TextStream(Numbers()),
                ends=frozenset({900}),
                most=most,
                logprobs=None,
                **fields,
            )
            for i in range(n)
        ]
        self._left = n

    def _take(self, index: int, event: Event) -> None:
        self.events[index].append(event)
        if isinstance(event, End | ApiError):
            self._left -= 1
            if not self._left:
                self.done.set()

    def result(self, index: int = 0) -> tuple[str, Event]:
        """Wait, and return the text and the last event."""
        assert self.done.wait(20)
        texts = [event.text for event in self.events[index] if isinstance(event, Step)]
        return "".join(texts), self.events[index][-1]


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    opened: list[tuple[Scheduler, Counting]] = []

    def begin(rows: int = 2, queue: int = 4, seconds: float = 30) -> tuple[Scheduler, Counting]:
        fake = Counting(rows)
        opened.append((Scheduler([fake], [rows], queue, seconds, Metrics()), fake))
        return opened[-1]

    yield begin
    for scheduler, fake in opened:
        fake.gate.set()
        scheduler.end()
        scheduler.join(10)


def submit(scheduler: Scheduler, *clients: Client) -> None:
    for client in clients:
        scheduler.submit(client.job, client.work)


def test_requests_share_steps_and_get_their_own_tokens(start: Callable[..., Any]) -> None:
    scheduler, fake = start(rows=3)
    fake.gate.clear()
    clients = [Client([10 * i, 10 * i + 1], 5) for i in range(1, 4)]
    submit(scheduler, *clients)
    fake.gate.set()
    for i, client in enumerate(clients, 1):
        text, end = client.result()
        assert text == "".join(f"{10 * i + k} " for k in range(2, 7))
        assert isinstance(end, End) and (end.reason, end.tokens, end.cached) == ("length", 5, 0)
    assert max(len(call[1]) for call in fake.calls if call[0] == "step") == 3
    assert scheduler.running == scheduler.waiting == 0


def test_the_end_token(start: Callable[..., Any]) -> None:
    scheduler, _ = start()
    client = Client([897], 50)
    submit(scheduler, client)
    text, end = client.result()
    assert text == "898 899 " and isinstance(end, End) and end.reason == "stop" and end.tokens == 2


def test_a_long_prompt_is_read_between_steps(start: Callable[..., Any]) -> None:
    scheduler, fake = start()
    fake.capacity = 10_000
    first, second = Client([1], 40), Client(list(range(100, 300)), 2)
    fake.gate.clear()
    submit(scheduler, first, second)
    fake.gate.set()
    assert first.result()[1].tokens == 40  # type: ignore[union-attr]
    second.result()
    kinds = [call[0] if call[0] != "extend" else len(call[2]) for call in fake.calls]
    assert kinds[:3] == [1, "step", 32] and kinds.count(32) == 6  # 200 tokens: six chunks and a rest
    assert all(kinds[i + 1] == "step" for i, kind in enumerate(kinds[:12]) if kind == 32)


def test_the_next_turn_finds_its_prefix(start: Callable[..., Any]) -> None:
    scheduler, fake = start()
    one = Client([1, 2, 3], 4)  # the cache then has 1 2 3 4 5 6, and 7 was the last token
    submit(scheduler, one)
    one.result()
    two = Client([1, 2, 3, 4, 5, 6, 7, 50], 2)
    submit(scheduler, two)
    _, end = two.result()
    assert isinstance(end, End) and end.cached == 6
    assert [call[2] for call in fake.calls if call[0] == "extend"] == [(1, 2, 3), (7, 50)]
    again = Client([1, 2, 3, 4, 5, 6, 7, 50], 1)
    submit(scheduler, again)
    assert again.result()[1].cached == 7  # type: ignore[union-attr]  # the last token gives the logits
    other = Client([1, 2, 3, 4], 1, lora=OTHER)
    submit(scheduler, other)
    assert other.result()[1].cached == 0  # type: ignore[union-attr]


def test_choices_of_one_prompt_compute_it_once(start: Callable[..., Any]) -> None:
    scheduler, fake = start(rows=3)
    client = Client([5, 6, 7, 8], 3, n=3)
    submit(scheduler, client)
    client.result()
    assert sorted(len(call[2]) for call in fake.calls if call[0] == "extend") == [1, 1, 4]
    assert sorted(call[3] for call in fake.calls if call[0] == "copy") == [3, 3]
    assert all(client.result(i)[0] == "9 10 11 " for i in range(3))


def test_a_short_common_prefix_does_not_take_a_long_cache(start: Callable[..., Any]) -> None:
    scheduler, fake = start(rows=2)
    long = Client(list(range(1, 31)), 1)
    submit(scheduler, long)
    long.result()
    other = Client([1, 2, 3, 500], 1)
    submit(scheduler, other)
    assert other.result()[1].cached == 3  # type: ignore[union-attr]
    back = Client([*range(1, 31), 600], 1)
    submit(scheduler, back)
    assert back.result()[1].cached == 30  # type: ignore[union-attr]
    assert [call[0] for call in fake.calls].count("copy") == 1


def test_the_queue_has_a_limit_and_an_order(start: Callable[..., Any]) -> None:
    scheduler, fake = start(rows=1, queue=2)
    fake.gate.clear()
    clients = [Client([10 * i], 2) for i in range(1, 4)]
    submit(scheduler, *clients)
    assert (scheduler.running, scheduler.waiting) == (1, 2)
    with pytest.raises(ApiError, match="2 requests wait already") as caught:
        submit(scheduler, Client([90], 2))
    assert caught.value.status == 503 and caught.value.code == "queue_full"
    fake.gate.set()
    for client in clients:
        client.result()
    assert [call[2] for call in fake.calls if call[0] == "extend"] == [(10,), (20,), (30,)]


def test_a_client_that_leaves_frees_its_row(start: Callable[..., Any]) -> None:
    scheduler, fake = start(rows=1)
    fake.gate.clear()
    leaving, waits, last = Client([1], 60), Client([20], 60), Client([30], 2)
    submit(scheduler, leaving, waits, last)
    scheduler.cancel(leaving.job)
    scheduler.cancel(waits.job)
    fake.gate.set()
    assert last.result()[0] == "31 32 "
    assert len(leaving.events[0]) <= 1 and waits.events == [[]]
    assert scheduler.running == 0


def test_a_request_that_takes_too_long(start: Callable[..., Any]) -> None:
    scheduler, fake = start(rows=1, seconds=0.2)
    fake.gate.clear()
    slow, waits = Client([1], 60, seconds=0.2), Client([20], 60, seconds=0.2)
    submit(scheduler, slow, waits)
    time.sleep(0.3)
    fake.gate.set()
    for client in (slow, waits):
        error = client.result()[1]
        assert isinstance(error, ApiError) and error.status == 504 and error.code == "time_limit"


def test_stopping_lets_running_requests_end(start: Callable[..., Any]) -> None:
    scheduler, fake = start(rows=1)
    fake.gate.clear()
    runs, waits = Client([1], 3), Client([20], 3)
    submit(scheduler, runs, waits)
    scheduler.stop()
    error = waits.result()[1]
    assert isinstance(error, ApiError) and error.code == "stopping"
    with pytest.raises(ApiError, match="stopping"):
        submit(scheduler, Client([1]))
    fake.gate.set()
    assert runs.result()[0] == "2 3 4 "


def test_the_end_meets_running_requests_too(start: Callable[..., Any]) -> None:
    scheduler, fake = start(rows=1)
    fake.gate.clear()
    client = Client([1], 60, n=2)
    submit(scheduler, client)
    scheduler.end()
    fake.gate.set()
    scheduler.join(10)
    errors = [client.result(i)[1] for i in range(2)]
    assert all(isinstance(error, ApiError) and error.status == 503 for error in errors)


def test_a_step_that_fails_ends_its_requests_only(start: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    scheduler, fake = start(rows=2)
    fake.fails = BundleError("the graph fails")
    client = Client([1, 2, 3], 5)
    submit(scheduler, client)
    error = client.result()[1]
    assert isinstance(error, ApiError) and error.status == 500 and "the graph fails" in caplog.text
    fake.fails = None
    client = Client([1, 2, 3], 2)
    submit(scheduler, client)
    text, end = client.result()
    assert text == "4 5 " and isinstance(end, End) and end.cached == 0


def test_logits_that_are_not_finite_end_one_row(start: Callable[..., Any]) -> None:
    scheduler, fake = start(rows=2)
    fake.gate.clear()
    bad, good = Client([664], 9), Client([1], 9)
    submit(scheduler, bad, good)
    fake.gate.set()
    error = bad.result()[1]
    assert isinstance(error, ApiError) and error.status == 500 and "not finite" in str(error)
    assert isinstance(good.result()[1], End)
