"""What every suite prints: rows of figures, each beside its reference and its goal."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A bound on the ratio where there is a reference, else on the value."""

    bound: float
    sense: Literal["at most", "at least"]
    of: Literal["ratio", "value"]

    def met(self, number: float) -> bool:
        return number <= self.bound if self.sense == "at most" else number >= self.bound

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:g}{' x' if self.of == 'ratio' else ''}"


def ratio(sense: Literal["at most", "at least"], bound: float) -> Goal:
    return Goal(bound=bound, sense=sense, of="ratio")


def value(sense: Literal["at most", "at least"], bound: float) -> Goal:
    return Goal(bound=bound, sense=sense, of="value")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. `reference` is the bare one of the same run; `runs` how many samples or rounds made the figure.

    A goal with a condition (so fast, *at* this recall) is met only if `holds`.
    """

    name: str
    value: float
    unit: str
    goal: Goal | None = None
    reference: float | None = None
    runs: int = 1
    holds: bool = True

    @property
    def ratio(self) -> float | None:
        return self.value / self.reference if self.reference else None

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        number = self.ratio if self.goal.of == "ratio" else self.value
        return None if number is None else self.holds and self.goal.met(number)

    def as_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "value": round(self.value, 4),
            "unit": self.unit,
            "reference": None if self.reference is None else round(self.reference, 4),
            "ratio": None if self.ratio is None else round(self.ratio, 3),
            "goal": None if self.goal is None else str(self.goal),
            "met": self.met,
            "runs": self.runs,
        }


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample that `share` of all are at or below (nearest rank)."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def machine() -> str:
    """What the figures were taken on."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{os.cpu_count()} x {model}, {platform.system()} {platform.release()}, Python {platform.python_version()}"


def as_json(suite: str, rows: Sequence[Row]) -> str:
    return json.dumps({"suite": suite, "machine": machine(), "rows": [row.as_dict() for row in rows]})


def show(suite: str, rows: Sequence[Row]) -> None:
    """One table on standard output."""
    table = Table(title=f"{suite} on {machine()}")
    for heading in ("name", "value", "unit", "reference", "ratio", "goal", "met", "runs"):
        table.add_column(heading, justify="left" if heading in ("name", "unit", "goal") else "right")
    for row in rows:
        shown = row.as_dict()
        table.add_row(*("-" if shown[key] is None else str(shown[key]) for key in _COLUMNS))
    Console(width=140).print(table)


_COLUMNS = ("name", "value", "unit", "reference", "ratio", "goal", "met", "runs")

__all__ = ["Row", "as_json", "machine", "median", "percentile", "ratio", "show", "value"]
