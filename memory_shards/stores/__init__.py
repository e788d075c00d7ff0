"""Stores: one file a backend, each kept up to date from the log by a projection.

A store is opened on a folder or URL and then lives on two sides:

* `apply` runs on the store's own worker thread, never two at a time. It takes records in log order and commits
  their effects and the new watermark in one transaction. A record at or below the watermark has no effect.
* `settle` runs there too, while no records wait: it finishes what they left undone.
* reads run wherever the store's docstring says, while `apply` goes on.

What a store keeps is derived: deleting its files loses nothing, the log rebuilds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mnemesh.event import Record


class Store(Protocol):
    """What a projection needs of any store."""

    @property
    def watermark(self) -> int:
        """The last log sequence applied and committed."""

    def shows(self, record: Record) -> bool:
        """Whether a read can tell that this record, the next one, was applied. Called between two applies."""

    def apply(self, records: Sequence[Record], watermark: int) -> None:
        """Commit the effects of `records` and then stand at `watermark` (≥ the last record's sequence).

        `watermark` may be past the last record: the log's events in between belong to other shards.
        """

    @property
    def is_settled(self) -> bool:
        """Whether all that the records ask for is done. May be asked on any thread."""

    def settle(self) -> None:
        """Commit a small step of what is left, such as to erase from the file what was forgotten."""

    def digest(self) -> str:
        """A hash over all that it holds: the same on replicas that have applied the same log."""

    def close(self) -> None:
        """Release files and threads. The store is not used after."""
