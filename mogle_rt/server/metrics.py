"""Counters and gauges in Prometheus' form. Labels are routes and statuses, never anything that a person wrote."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
IMAGES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """What ``GET /metrics`` tells. Each server has its own registry."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("mogle_rt_requests", "Answers", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "mogle_rt_request_seconds", "From a request to its answer", ["route"], buckets=SECONDS, registry=registry
        )
        self.images = Counter("mogle_rt_images", "Images drawn", registry=registry)
        self.cancelled = Counter(
            "mogle_rt_cancelled", "Jobs that were cancelled or whose client left", registry=registry
        )
        self.batches = Histogram("mogle_rt_batch_images", "Images drawn at once", buckets=IMAGES, registry=registry)
        self.batch_seconds = Histogram(
            "mogle_rt_batch_seconds", "Time to draw a batch", buckets=SECONDS, registry=registry
        )
        self.drawing = Gauge("mogle_rt_images_drawing", "Images that are being drawn", registry=registry)
        Gauge("mogle_rt_images_waiting", "Images that wait", registry=registry).set_function(waiting)

    def text(self) -> bytes:
        """All of it, as text."""
        return generate_latest(self.registry)
