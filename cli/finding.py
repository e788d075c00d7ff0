"""What a check of `mnemesh doctor` found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `advice` says what to do where the verdict is not `ok`."""

    verdict: Literal["ok", "warning", "wrong"]
    what: str
    advice: str = ""


def ok(what: str) -> Finding:
    """As it should be."""
    return Finding("ok", what)


def warning(what: str, advice: str) -> Finding:
    """The mesh works, but not as it was meant to."""
    return Finding("warning", what, advice)


def wrong(what: str, advice: str) -> Finding:
    """Something does not work, or is not safe."""
    return Finding("wrong", what, advice)


def named(names: Iterable[object], most: int = 8) -> str:
    """The first names of many, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
