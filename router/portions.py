"""Portions of ids: as many at a time as fit a request, for an id may have 16 KiB. Looks at nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def portions(
    items: Sequence[Item], *, most: int, most_bytes: int, id_of: Callable[[Item], str]
) -> Iterator[Sequence[Item]]:
    """The items in parts of at most so many, and of so many bytes of ids, but at least one."""
    start = size = 0
    for end, item in enumerate(items):
        length = len(id_of(item).encode())
        if end - start == most or (end > start and size + length > most_bytes):
            yield items[start:end]
            start, size = end, 0
        size += length
    if items:
        yield items[start:]
