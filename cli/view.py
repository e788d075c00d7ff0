"""`mnemesh view set | list | remove`: which attributes of which entities there is a vector of.

`services/view.py` has the format. Views are a site's own: a hub's, not of its devices.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from cli.operator import asking, options_of
from cli.server_config import ServerOptions
from cli.verbs import add_verbs, text_in
from mnemesh import kv, subjects
from mnemesh.asker import Asker
from mnemesh.embedding import embedder
from mnemesh.errors import BadRequest, NotFound
from mnemesh.ids import check_name
from mnemesh.inbox import Inbox
from mnemesh.messages import Status, ViewSeen
from services.spaces import Space
from services.view import View, decode_view, parse

LOOK_S = 0.5


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    abouts = {
        "set": "add or change a view, from a file",
        "list": "the views, and where each stands",
        "remove": "keep a view no more",
    }
    remove = add_verbs(parser, data, abouts)["remove"]
    remove.add_argument("name")
    remove.add_argument(
        "--with-vectors", action="store_true", help="take its vectors out of its space, and wait until they are"
    )


def run(flags: argparse.Namespace) -> int:
    """Returns the exit status. Raises a `MnemeshError` that says what cannot be."""
    if flags.verb == "set":
        view = read_view(flags.file)
        work = _set(options_of(flags.data), view)
    elif flags.verb == "remove":
        work = _remove(options_of(flags.data), check_name("view", flags.name), with_vectors=flags.with_vectors)
    else:
        work = _list(options_of(flags.data))
    asyncio.run(work)
    return 0


def read_view(file: Path) -> View:
    """The view in a file. Raises `BadRequest` that says what is wrong with it."""
    return parse(text_in(file, "view"))


async def _set(options: ServerOptions, view: View) -> None:
    async with asking(options, "view") as asker:
        await put_view(asker.inbox, view)


async def put_view(inbox: Inbox, view: View) -> None:
    """Have a view be kept, if it can be. Raises `BadRequest`."""
    if await kv.get(inbox, subjects.TENANTS.name, view.tenant) is None:
        raise BadRequest(f"there is no tenant {view.tenant!r} in this mesh; `mnemesh up --tenant` makes it")
    for name in await kv.keys(inbox, subjects.VIEWS.name):
        held = await kv.get(inbox, subjects.VIEWS.name, name)
        other = None if held is None or name == view.name else decode_view(held)
        if other is not None and (other.tenant, other.space) == (view.tenant, view.space):
            raise BadRequest(f"space {view.space!r} is that of view {other.name!r}; name one of its own")
    held = await kv.get(inbox, subjects.SPACES.name, f"{view.tenant}.{view.space}")
    space = None if held is None else msgspec.json.decode(held, type=Space)
    if space is not None and (space.dimension, space.model) != (embedder(view.embedder).dimension, view.embedder):
        made = "no embedder" if space.model is None else repr(space.model)
        raise BadRequest(
            f"space {view.space!r} has vectors of {space.dimension} dimensions, made by {made}; "
            f"name another one for those of {view.embedder!r}"
        )
    await kv.put(inbox, subjects.VIEWS.name, view.name, view.encode())


async def _remove(options: ServerOptions, name: str, *, with_vectors: bool) -> None:
    async with asking(options, "view") as asker:
        held = await kv.get(asker.inbox, subjects.VIEWS.name, name)
        if held is None:
            raise NotFound(f"there is no view {name!r}; `mnemesh view list` tells which there are")
        if with_vectors:
            gone = msgspec.structs.replace(decode_view(held), removed=True)
            await kv.put(asker.inbox, subjects.VIEWS.name, name, gone.encode())
            print(f"taking the vectors of {name} out of space {gone.space} …", flush=True)
            await _filled(asker, gone)
        await kv.delete(asker.inbox, subjects.VIEWS.name, name)


async def _filled(asker: Asker, view: View) -> None:
    """Wait until a view has gone through all that it is about."""
    while True:
        seen = {each.name: each for each in await _seen(asker)}.get(view.name)
        if seen is not None and seen.definition == view.definition and seen.filled:
            return
        await asyncio.sleep(LOOK_S)


async def _seen(asker: Asker) -> list[ViewSeen]:
    return (await asker.ask(subjects.VIEW_STATUS, subjects.view_status(), Status())).views


async def _list(options: ServerOptions) -> None:
    async with asking(options, "view") as asker:
        views = await _seen(asker)
    table = Table("view", "tenant", "type", "attributes", "space", "embedder", "state", "behind", "refused", box=None)
    for seen in views:
        about = (seen.name, seen.tenant, seen.type, " ".join(seen.attributes), seen.space, seen.embedder)
        table.add_row(*about, _state(seen), str(seen.waiting), str(seen.refused))
    Console().print(table)


def _state(seen: ViewSeen) -> str:
    state = "is being removed" if seen.removed else "kept" if seen.filled else "is being filled"
    return f"{state}; {seen.trouble}" if seen.trouble else state
