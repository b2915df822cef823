"""Prometheus metrics of a reward server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts since the start of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Responses to /score, by HTTP status.", "status")
        self._request_seconds = self._counter("request_seconds", "Seconds from the start of a request to its response.")
        self._images = self._counter("images", "Images scored.")
        self._scoring_seconds = self._counter("scoring_seconds", "Seconds in successful forward passes.")
        self._scoring_errors = self._counter("scoring_errors", "Requests that a reward failed on.")
        self._batch_images = Histogram(
            "rlhf_t2i_batch_images", "Images scored in one forward pass.", buckets=_BATCH_SIZES, registry=self.registry
        )

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"rlhf_t2i_{name}", help, labels, registry=self.registry)

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Report the result of `length` as the gauge queue_length."""
        gauge = Gauge("rlhf_t2i_queue_length", "Requests in progress: received or scored.", registry=self.registry)
        gauge.set_function(length)

    def count_request(self, status: int, *, seconds: float) -> None:
        """Count a response to /score."""
        self._requests.labels(status).inc()
        self._request_seconds.inc(seconds)

    def count_batch(self, num_images: int, *, seconds: float) -> None:
        """Count a successful forward pass."""
        self._batch_images.observe(num_images)
        self._images.inc(num_images)
        self._scoring_seconds.inc(seconds)

    def count_error(self) -> None:
        """Count a request that a reward failed on."""
        self._scoring_errors.inc()

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
