"""What the server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters and histograms; the reference of the API lists them."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, labels, registry=registry)

        def histogram(name: str, help: str) -> Histogram:
            return Histogram(name, help, buckets=_SECONDS, registry=registry)

        self._requests = counter("coatrt_requests", "Requests to /v1 by status", "status")
        self._requests.labels("200")
        self._prompt = counter("coatrt_prompt_tokens", "Tokens of prompts")
        self._cached = counter("coatrt_cached_tokens", "Tokens of prompts that were in a cache")
        self._tokens = counter("coatrt_tokens", "Generated tokens")
        self._seconds = histogram("coatrt_request_seconds", "Duration of requests")
        self._first = histogram("coatrt_first_token_seconds", "Time from a request to its first token")

    def request(self, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def prompt_tokens(self, count: int) -> None:
        """Count tokens of prompts that were computed."""
        self._prompt.inc(count)

    def cached_tokens(self, count: int) -> None:
        """Count tokens of prompts that were in a cache."""
        self._prompt.inc(count)
        self._cached.inc(count)

    def tokens(self, count: int) -> None:
        """Count generated tokens."""
        self._tokens.inc(count)

    def first_token(self, seconds: float) -> None:
        """Note the time to a first token."""
        self._first.observe(seconds)

    def watch(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read when it is asked for."""
        Gauge(name, help, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """Return everything in Prometheus' format."""
        return generate_latest(self._registry)
