"""What the kernel says of a process: how busy it is, and how much memory it holds. Linux only."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

IDLE_S = 300.0


async def idle(*pids: int | None) -> None:
    """Wait until processes were idle for a second, all of them.

    A shard's graph is built beside searches, and nothing tells when that ends. The next search swaps it in.
    """
    async with asyncio.timeout(IDLE_S):
        while True:
            before = sum(map(cpu_s, pids))
            await asyncio.sleep(1)
            if sum(map(cpu_s, pids)) - before < 0.1:
                return


def cpu_s(pid: int | None) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pss_mib(pid: int | None) -> float:
    """The memory of a process, in MiB: pages that it shares count in equal parts for each who has them (PSS)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/{pid}/smaps_rollup tells no Pss")
