"""What an actor counts, one `OperationStats` an operation: read by ADR-32's STATS and by the Prometheus exporter."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.022, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the latency histogram, in seconds. 22 ms is the decision budget of the proving case."""


@dataclass(slots=True)
class OperationStats:
    """Counts of one operation since the actor started. Times are seconds from arrival to reply."""

    requests: int = 0
    in_flight: int = 0
    waiting: int = 0
    seconds: float = 0.0
    last_error: str = ""
    codes: Counter[str] = field(default_factory=Counter)
    histogram: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))

    def record(self, code: str, seconds: float) -> None:
        """Count one answered request; `code` is `ok` or an error's code."""
        self.requests += 1
        self.codes[code] += 1
        self.seconds += seconds
        self.histogram[bisect_left(BUCKETS_S, seconds)] += 1

    @property
    def errors(self) -> int:
        return self.requests - self.codes["ok"]


@dataclass(frozen=True, slots=True)
class Gauge:
    """A value read when somebody looks. Gauges of one name differ in the values of the same labels."""

    name: str
    about: str
    read: Callable[[], float]
    labels: Mapping[str, str] = field(default_factory=dict)
