"""Many rows in one SQLite statement.

`executemany` steps once a row, and each step lets go of the GIL and takes it back. Where another thread waits for it
(the event loop, the other store's worker), that hands the processor over thousands of times a batch: two stores that
apply 20,000 events/s each when alone came to 5,000 to 9,000 together. One step for up to 256 rows leaves SQLite to
work beside Python. Looks at the standard library only.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any, TypeVar

Row = TypeVar("Row")

_MOST_ROWS = 256
_MOST_VALUES = 4_096


def execute_all(connection: sqlite3.Connection, statement: str, rows: Sequence[Sequence[Any]]) -> None:
    """Run an INSERT with `{rows}` in place of its `(?, …), …` for all rows, in their order.

    Say `INSERT OR FAIL`: what fails half-way is left to the transaction to undo, so SQLite need not journal for it.
    """
    if not rows:
        return
    width = len(rows[0])
    for some in _cut(rows, _MOST_VALUES // width):
        connection.execute(_over(statement, len(some), width), list(chain.from_iterable(some)))


def select_all(connection: sqlite3.Connection, query: str, keys: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """The rows of a query with `{rows}` in place of the `(?, …), …` of its `VALUES`, for all keys."""
    if not keys:
        return
    width = len(keys[0])
    for some in _cut(keys, _MOST_VALUES // width):
        yield from connection.execute(_over(query, len(some), width), list(chain.from_iterable(some))).fetchall()


def _cut(rows: Sequence[Row], most: int) -> Iterator[Sequence[Row]]:
    """Pieces of a power of two, so that few statements are ever compiled and all stay in the connection's cache."""
    size = 1 << (min(most, _MOST_ROWS).bit_length() - 1)
    start = 0
    while start < len(rows):
        while size > len(rows) - start:
            size >>= 1
        yield rows[start : start + size]
        start += size


@cache
def _over(statement: str, rows: int, width: int) -> str:
    """The statement over so many rows: of a power of two, so there are few."""
    return statement.format(rows=",".join(["(" + ",".join("?" * width) + ")"] * rows))
