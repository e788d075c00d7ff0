"""A shard's folder: one process at a time has it, for two that apply the log to one store would spoil it.

The lock is the kernel's (`flock`), so it goes with its holder, however that ends. A folder whose files are no good any
more is condemned: its next holder begins with an empty one. A file that is built anew beside the one that is read lies
in a folder `beside` it, from which the next holder takes it once it is `finished`. Looks at `mnemesh` only.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import IO

from mnemesh.errors import Unavailable

logger = logging.getLogger("mnemesh.folder")

LOCK = "lock"
CONDEMNED = "condemned"
BESIDE = "beside-"
FINISHED = "finished"
GENERATION = "generation-"
HANDOVER_S = 5.0
"""How long a new process waits for an old one that is still draining."""
POLL_S = 0.05


async def hold(folder: Path) -> IO[str]:
    """Take the folder, made if need be, until the file that is returned is closed.

    Raises `Unavailable` if another process still has it after `HANDOVER_S`.
    """
    deadline = asyncio.get_running_loop().time() + HANDOVER_S
    while (lock := _lock(folder)) is None:
        if asyncio.get_running_loop().time() >= deadline:
            raise _taken(folder)
        await asyncio.sleep(POLL_S)
    if (folder / CONDEMNED).exists():
        clear(folder)
        logger.warning("what was in %s could not be read any more; its stores start from empty", folder)
    _take_over(folder)
    return lock


def beside(folder: Path) -> Path:
    """A new folder, within one that we hold, for files that are to take the place of those there."""
    number = max((int(path.name.removeprefix(BESIDE)) for path in folder.glob(f"{BESIDE}*")), default=0) + 1
    made = folder / f"{BESIDE}{number}"
    made.mkdir()
    return made


def finished(made: Path) -> None:
    """What is in a folder that was made `beside` is what is read from now on."""
    (made / FINISHED).touch()


def kept_generations(folder: Path) -> dict[str, int]:
    """Which generation is read of each store that only the folder's holder has, and that is no file."""
    return {path.name.removeprefix(GENERATION): int(path.read_text()) for path in folder.glob(f"{GENERATION}*")}


def keep_generation(folder: Path, name: str, generation: int) -> None:
    """Have the next holder read this generation of a store."""
    (folder / f"{GENERATION}{name}").write_text(str(generation))


def _take_over(folder: Path) -> None:
    """Put in place what was finished beside, the last one last, and remove what was not."""
    for made in sorted(folder.glob(f"{BESIDE}*"), key=lambda path: int(path.name.removeprefix(BESIDE))):
        if (made / FINISHED).exists():
            for file in made.glob("*.db"):
                with closing(sqlite3.connect(file)) as connection:
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # it is all in the one file then
                for suffix in ("-wal", "-shm"):
                    (folder / f"{file.name}{suffix}").unlink(missing_ok=True)
                file.replace(folder / file.name)
        shutil.rmtree(made)


def condemn(folder: Path) -> None:
    """Have whoever holds the folder next begin with an empty one."""
    (folder / CONDEMNED).touch()


def _lock(folder: Path) -> IO[str] | None:
    """The lock, with our process id in it for whoever finds it taken; `None` if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _taken(folder: Path) -> Unavailable:
    return Unavailable(
        f"{folder.absolute()} is in use by process {(folder / LOCK).read_text()}: "
        "give each replica a folder of its own, or stop that process"
    )


def clear(folder: Path) -> None:
    """Remove all that is in a folder that we hold, but for its lock; last the mark that this is to be done."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (LOCK, CONDEMNED):
            path.unlink()
    (folder / CONDEMNED).unlink(missing_ok=True)
