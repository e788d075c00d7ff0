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
    number = max(_made_beside(folder), default=0) + 1
    made = folder / f"{BESIDE}{number}"
    made.mkdir()
    return made


def finished(made: Path) -> None:
    """What is in a folder that was made `beside` is what is read from now on."""
    for file in made.iterdir():
        _sync(file)
    (made / FINISHED).touch()
    _sync(made)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _made_beside(folder: Path) -> dict[int, Path]:
    """The folders that were made beside what is there, by their numbers, in order."""
    found = {path.name.removeprefix(BESIDE): path for path in folder.glob(f"{BESIDE}*")}
    return {number: found[str(number)] for number in sorted(int(name) for name in found if name.isdecimal())}


def kept_generations(folder: Path) -> dict[str, int]:
    """Which generation is read of each store that only the folder's holder has, and that is no file."""
    found = {path.name.removeprefix(GENERATION): path.read_text() for path in folder.glob(f"{GENERATION}*")}
    return {name: int(generation) for name, generation in found.items() if generation.isdecimal()}


def keep_generation(folder: Path, name: str, generation: int) -> None:
    """Have the next holder read this generation of a store."""
    written = folder / f"new-{GENERATION}{name}"
    written.write_text(str(generation))
    _sync(written)
    written.replace(folder / f"{GENERATION}{name}")


def _take_over(folder: Path) -> None:
    """Put in place what was finished beside, the last one last, and remove what was not."""
    for made in _made_beside(folder).values():
        if (made / FINISHED).exists():
            for file in made.glob("*.db"):
                try:
                    _put_in_place(file, folder / file.name)
                except sqlite3.DatabaseError as error:
                    logger.warning("%s was built anew and cannot be read, so the one before stays: %s", file, error)
        shutil.rmtree(made)


def _put_in_place(file: Path, place: Path) -> None:
    """Raises `sqlite3.DatabaseError` where the file is no good; the other is left then."""
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # it is all in the one file then
    for suffix in ("-wal", "-shm"):
        place.with_name(f"{place.name}{suffix}").unlink(missing_ok=True)
    file.replace(place)


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
