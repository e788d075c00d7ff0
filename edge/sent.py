"""Up to where a device sent its log, in a file of the device's folder: so one that was restored or copied is known.

The hub says the same of the device. Where it has more than this folder ever sent, that came from another one. Written
before the batch is on its way, without a sync: after a power cut it may be some seconds old. Looks at `mnemesh` only.
"""

from __future__ import annotations

import os
from pathlib import Path

from mnemesh.errors import Unavailable
from mnemesh.origin import Mark

_BYTES = 256


class Sent:
    """The last mark that was sent, in `file`, which is made at the first one."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def note(self, mark: Mark) -> None:
        """Keep a mark that goes out next. Raises `Unavailable` where the disk is full or broken."""
        text = f"{mark.sequence} {mark.incarnation} {mark.last}"
        try:
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o600)
            with open(descriptor, "wb", buffering=0) as file:  # not emptied first: a kill leaves the one or the other
                file.write(text.encode().ljust(_BYTES))
        except OSError as error:
            raise Unavailable(f"{self._file} cannot be written: {error}") from error

    def may_be_ours(self, mark: Mark) -> bool:
        """Whether this folder sent what this mark is after. It says yes where it cannot know."""
        try:
            told, incarnation, last = self._file.read_text().split()
            sequence = int(told)
        except (OSError, ValueError):  # of an earlier release, or nothing was sent
            return True
        if incarnation != mark.incarnation or sequence == mark.sequence:
            return last == mark.last
        return sequence > mark.sequence
