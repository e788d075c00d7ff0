"""Portions of a list: as many items at a time as fit a request, by their number and bytes. Looks at nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def portions(
    items: Sequence[Item], *, most: int, most_bytes: float, size_of: Callable[[Item], int]
) -> Iterator[Sequence[Item]]:
    """The items in parts of at most so many, and of so many bytes, but of at least one item."""
    start = size = 0
    for end, item in enumerate(items):
        length = size_of(item)
        if end - start == most or (end > start and size + length > most_bytes):
            yield items[start:end]
            start, size = end, 0
        size += length
    if items:
        yield items[start:]


def bytes_of(text: str) -> int:
    """What a text takes in UTF-8. An id may have 16 KiB."""
    return len(text.encode())
