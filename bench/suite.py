"""What a suite is: groups of rows, each measured together."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias, TypeVar

from bench.report import Row
from mnemesh.errors import BadRequest

logger = logging.getLogger("bench")

Sizes = TypeVar("Sizes")

Group: TypeAlias = tuple[tuple[str, ...], Callable[[Sizes], Awaitable[list[Row]]]]
"""The names of some rows, and what measures them."""


async def measured(groups: Sequence[Group[Sizes]], sizes: Sizes, wanted: Sequence[str]) -> list[Row]:
    """Measure every group that has a wanted row (all of them if none is named). Raises `BadRequest` for a stranger."""
    known = [name for names, _ in groups for name in names]
    if strangers := set(wanted) - set(known):
        raise BadRequest(f"no row {', '.join(sorted(strangers))}; there are {', '.join(known)}")
    rows: list[Row] = []
    for names, measure in groups:
        if not wanted or set(names) & set(wanted):
            logger.info("measuring %s", ", ".join(names))
            rows += await measure(sizes)
    return [row for row in rows if not wanted or row.name in wanted]
