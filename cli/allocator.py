"""How a process gives back the memory that it has freed. Python and FAISS get theirs from the C library.

glibc keeps what was freed for the next who asks: one pool a thread, of blocks up to 32 MiB once such a one was freed. A
device that had written 50,000 memories of 384 dimensions and built their graph held 220 MiB where it needed 150. Other
C libraries are left as they are. SQLite keeps pages of files that the system has in memory already.

https://man7.org/linux/man-pages/man3/mallopt.3.html, https://www.sqlite.org/pragma.html#pragma_soft_heap_limit
"""

from __future__ import annotations

import asyncio
import ctypes
import platform
import sqlite3
from contextlib import closing

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # malloc.h
_OWN_MAPPING_FROM = 1 << 20
_POOLS = 2
TRIM_S = 60.0
_SQLITE_BYTES = 4 << 20
"""What all page caches of the process may have. 50,000 memories are applied as fast with 2 MiB, and with 12."""


def give_large_back() -> None:
    """Blocks from 1 MiB on go back as soon as they are freed, from now on.

    A shard that starts from a snapshot has a gigabyte of pieces pass through its threads: 27 MiB stayed in their pools.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _OWN_MAPPING_FROM)


async def keep_small() -> None:
    """Blocks from 1 MiB on go back at once, threads share two pools, and free pages go back every minute; for ever.

    SQLite's caches of pages are small from now on.
    """
    with closing(sqlite3.connect(":memory:")) as anyone:
        anyone.execute(f"PRAGMA soft_heap_limit = {_SQLITE_BYTES}")
    if platform.libc_ver()[0] != "glibc":
        return
    give_large_back()
    libc = ctypes.CDLL(None)
    libc.mallopt(_ARENA_MAX, _POOLS)
    while True:
        await asyncio.sleep(TRIM_S)
        await asyncio.to_thread(libc.malloc_trim, 0)  # 5 to 10 ms where there is much to give back
