"""For which log and which partitions a SQLite file was built, so that a store never mixes two of them.

A store is derived: where the file was built for another site, another set of partitions, another incarnation of the
log (the stream's creation time), another layout of its tables or other parts of what is remembered, it starts from
empty and the log rebuilds it.
Shared by every store that keeps a SQLite file. Looks at the standard library only.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Set

log = logging.getLogger(__name__)


def keep_or_clear(
    connection: sqlite3.Connection,
    *,
    site: str,
    partitions: Set[int],
    incarnation: str,
    layout: int,
    parts: Set[str] = frozenset(),
) -> bool:
    """Whether the file was built for just this. If not, drop every table, in the transaction that notes it.

    `connection` is in autocommit mode (`isolation_level=None`) and outside a transaction; the caller creates its
    tables after this, with `IF NOT EXISTS`. `False` for a new file too.
    """
    wanted = json.dumps([site, sorted(partitions), incarnation, layout, sorted(parts)])
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("CREATE TABLE IF NOT EXISTS provenance (built_for TEXT NOT NULL)")
        found = connection.execute("SELECT built_for FROM provenance").fetchall()
        kept = found == [(wanted,)]
        if not kept:
            if found:
                log.warning("%s was built for another log or partition set: cleared", _file(connection))
            _clear(connection)
            connection.execute("INSERT INTO provenance VALUES (?)", (wanted,))
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    return kept


def built_for(connection: sqlite3.Connection) -> str:
    """What a file was built for: files for which this is the same text have the same tables, from the same log."""
    return str(connection.execute("SELECT built_for FROM provenance").fetchone()[0])


def _clear(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM provenance")
    # Virtual tables first: each takes its shadow tables along, which cannot be dropped by name.
    tables = "SELECT name FROM sqlite_schema WHERE type = 'table' AND sql LIKE ? AND name NOT GLOB 'sqlite_*'"
    for pattern in ("CREATE VIRTUAL TABLE%", "CREATE TABLE%"):
        for (name,) in connection.execute(tables, (pattern,)).fetchall():
            if name != "provenance":
                connection.execute(f'DROP TABLE "{name}"')


def _file(connection: sqlite3.Connection) -> str:
    return str(connection.execute("PRAGMA database_list").fetchone()[2])
