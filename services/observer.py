"""The metrics and health page of a process: `/metrics` for Prometheus, `/healthz` for whoever asks if it lives.

Nothing is counted twice: the actors keep their own counts (`mnemesh.stats`), and a collector reads them when Prometheus
scrapes. The page is served by prometheus-client's WSGI application on a thread of its own, so it answers also while
the event loop is busy, and can then say so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from mnemesh.actor import Actor
from mnemesh.errors import Unavailable
from mnemesh.stats import BUCKETS_S, OperationStats

BEAT_S = 0.5
SILENT_S = 5.0


class ActorCollector(Collector):
    """Reads the counts of actors at every scrape."""

    def __init__(self, actors: Sequence[Actor]) -> None:
        self._actors = actors

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "mnemesh_requests", "Requests answered, by result code", labels=("role", "operation", "code")
        )
        seconds = HistogramMetricFamily(
            "mnemesh_request_seconds", "From arrival to reply, in seconds", labels=("role", "operation")
        )
        waiting = GaugeMetricFamily(
            "mnemesh_mailbox_waiting", "Requests that wait in the mailbox", labels=("role", "operation")
        )
        running = GaugeMetricFamily("mnemesh_in_flight", "Requests being worked on", labels=("role", "operation"))
        connected = GaugeMetricFamily("mnemesh_connected", "1 while connected to NATS", labels=("role",))
        gauges: dict[str, GaugeMetricFamily] = {}
        for actor in self._actors:
            connected.add_metric((actor.role,), float(actor.link.is_connected))
            for operation, stats in actor.stats.items():
                labels = (actor.role, operation)
                for code, count in list(stats.codes.items()):
                    requests.add_metric((*labels, code), count)
                seconds.add_metric(labels, buckets=_cumulative(stats), sum_value=stats.seconds)
                waiting.add_metric(labels, stats.waiting)
                running.add_metric(labels, stats.in_flight)
            for gauge in actor.gauges():
                name = f"mnemesh_{actor.role}_{gauge.name}"
                family = gauges.setdefault(name, GaugeMetricFamily(name, gauge.about, labels=tuple(gauge.labels)))
                family.add_metric(tuple(gauge.labels.values()), gauge.read())
        return [requests, seconds, waiting, running, connected, *gauges.values()]


def _cumulative(stats: OperationStats) -> list[tuple[str, float]]:
    total = 0
    buckets = []
    for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), stats.histogram, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets


class Health:
    """Whether the event loop turns and every actor is connected."""

    def __init__(self, actors: Sequence[Actor]) -> None:
        self._actors = actors
        self._beat = time.monotonic()

    async def run(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(BEAT_S)

    def report(self) -> tuple[bool, dict[str, Any]]:
        silent_s = max(0.0, time.monotonic() - self._beat - BEAT_S)
        actors = {actor.role: "connected" if actor.link.is_connected else "disconnected" for actor in self._actors}
        healthy = silent_s < SILENT_S and all(state == "connected" for state in actors.values())
        return healthy, {"healthy": healthy, "actors": actors, "loop_silent_s": round(silent_s, 3)}


@contextlib.asynccontextmanager
async def observed(actors: Sequence[Actor], *, host: str, port: int) -> AsyncIterator[int]:
    """Serve the page while the block runs; yields the port (a free one for `port=0`). Raises `Unavailable` if taken."""
    registry = CollectorRegistry()
    for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR, ActorCollector(actors)):
        registry.register(collector)
    health = Health(actors)
    metrics = make_wsgi_app(registry)

    def page(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != "/healthz":
            body: Iterable[bytes] = metrics(environ, start_response)
            return body
        healthy, report = health.report()
        start_response("200 OK" if healthy else "503 Service Unavailable", [("Content-Type", "application/json")])
        return [json.dumps(report).encode()]

    try:
        server = make_server(host, port, page, handler_class=_Quiet)
    except OSError as error:
        raise Unavailable(f"cannot serve metrics on {host}:{port}: {error.strerror}; choose another port") from error
    Thread(target=server.serve_forever, name="observer", daemon=True).start()
    beat = asyncio.ensure_future(health.run())
    try:
        yield server.server_port
    finally:
        beat.cancel()
        server.shutdown()
        server.server_close()


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A scrape is no event."""
