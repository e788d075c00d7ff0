"""Asking a running site, mostly as its operator."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from cli.server_config import ServerOptions, saved_options
from mnemesh.asker import Asker
from mnemesh.connection import Link
from mnemesh.errors import BadRequest


@contextlib.asynccontextmanager
async def asking(options: ServerOptions, name: str, *, role: str = "operator") -> AsyncIterator[Asker]:
    """An asker in a `role`; `name` is what the server shows for it. Raises `Unavailable` where the site is down."""
    link = await Link.open(options.credentials().load(role).link_options(name))
    try:
        yield await Asker(link).open()
    finally:
        await link.close()


def options_of(data: Path) -> ServerOptions:
    """The options of the site whose data folder this is. Raises `BadRequest` where it is none's."""
    try:
        return saved_options(data)
    except FileNotFoundError as error:
        raise BadRequest(f"{data} is no site's data folder") from error
