"""A disk of its own for a test, that may be full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk")


@contextmanager
def disk(folder: Path, *, megabytes: int) -> Iterator[Callable[[int], None]]:
    """A disk of its own at `folder`; yields what gives it another size."""
    folder.mkdir()

    def mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments, folder], check=True)

    mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs")
    try:
        yield lambda larger: mount("-o", f"remount,size={larger}m")
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
