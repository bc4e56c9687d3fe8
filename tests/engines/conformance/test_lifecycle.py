"""Many clients, queues, time limits, clients that leave, SIGTERM."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from support.openai_servers import Server
from support.reference import Reference

ENDLESS: dict[str, Any] = {"prompt": "the cat sat", "max_tokens": 8000, "temperature": 0, "ignore_eos": True}


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def test_many_clients_get_what_one_gets(server: Server, reference: Reference) -> None:
    prompts = [f"{word} the {word} sat" for word in ("cat", "dog", "hen", "owl", "fox", "bee", "the mat", "a")]
    names = ["own", "own", "base", "own"] * 2
    ids = [reference.encode(prompt) for prompt in prompts]
    expected = [
        reference.decode(reference.greedy(row, 20, lora=name).tokens) for row, name in zip(ids, names, strict=True)
    ]

    def ask(i: int) -> str:
        body = {"model": server.model if names[i] == "own" else f"{server.model}:base", "prompt": prompts[i]}
        response = server.post("/v1/completions", {**body, "max_tokens": 20, "temperature": 0})
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(ask, range(8))) == expected


@pytest.fixture(scope="module")
def small(start: Callable[..., Server]) -> Any:
    """A server with one place and a queue of one."""
    server = start("--context", "8192", "--queue", "1", "--time-limit", "2", parallel=1)
    yield server
    server.stop()


def test_a_client_that_leaves_ends_its_request(small: Server) -> None:
    for path, extra in (("/v1/completions", {}), ("/v1/completions", {"stream": True})):
        before = small.metric("coatrt_tokens_total")
        import httpx2

        body = {"model": small.model, **ENDLESS, **extra}
        with httpx2.Client(base_url=small.url, headers={"Authorization": f"Bearer {small.key}"}) as http:
            if extra:
                with http.stream("POST", path, json=body) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx2.TimeoutException):
                    http.post(path, json=body, timeout=0.1)
        wait_for(lambda: small.metric("coatrt_requests_running") == 0, 5)
        assert small.metric("coatrt_tokens_total") - before < 7000


def test_a_full_queue_refuses(small: Server) -> None:
    answers: list[int] = []
    bodies = {"model": small.model, **ENDLESS}
    threads = [
        threading.Thread(target=lambda: answers.append(small.post("/v1/completions", bodies).status_code))
        for _ in range(2)
    ]
    threads[0].start()
    wait_for(lambda: small.metric("coatrt_requests_running") == 1)
    threads[1].start()
    wait_for(lambda: small.metric("coatrt_requests_waiting") == 1)
    response = small.post("/v1/completions", bodies)
    assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "queue_full" and response.json()["error"]["type"] == "server_error"
    assert small.http.get("/health").status_code == 200
    for thread in threads:
        thread.join()
    assert answers[0] in (200, 504)


def test_a_request_has_a_time_limit(small: Server) -> None:
    started = time.monotonic()
    response = small.post("/v1/completions", {"model": small.model, **ENDLESS, "n": 16})
    assert response.status_code == 504 and response.json()["error"]["code"] == "time_limit"
    assert time.monotonic() - started < 10
    events = list(small.events("/v1/completions", {"model": small.model, **ENDLESS, "n": 16, "stream": True}))
    assert events[-1]["error"]["code"] == "time_limit" and "[DONE]" not in events


def test_sigterm_ends_the_server(start: Callable[..., Server]) -> None:
    server = start("--context", "8192", parallel=1)
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(server.post("/v1/completions", {"model": server.model, **ENDLESS, "n": 16}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: server.metric("coatrt_requests_running") >= 1)
    started = time.monotonic()
    server.stop()
    assert time.monotonic() - started < 8
    for thread in threads:
        thread.join()
    assert len(statuses) == 3 and set(statuses) <= {200, 503}
