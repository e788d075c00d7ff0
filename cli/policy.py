"""`mnemesh policy set | show | rm`: what may leave a site, at its hub or on a device that runs.

What is set at a hub is handed to its devices. What is set on a device holds for that device's own data, whatever the
hub hands. `services/sovereignty.py` has the format.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from cli.operator import asking, options_of
from cli.server_config import ServerOptions
from cli.verbs import add_verbs, text_in
from mnemesh import kv, subjects
from mnemesh.errors import BadRequest
from services.sovereignty_text import parse

OWN = "own"


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    about_rm = "all may leave again, or what the hub hands"
    add_verbs(parser, data, {"set": "what may leave, from a file", "show": "what holds", "rm": about_rm})


def run(flags: argparse.Namespace) -> int:
    """Returns the exit status. Raises a `MnemeshError` that says what cannot be."""
    text = read_policy(flags.file) if flags.verb == "set" else ""
    asyncio.run(_run(flags.verb, options_of(flags.data), text))
    return 0


def read_policy(file: Path) -> str:
    """The text of a policy file. Raises `BadRequest` that says what is wrong with it."""
    text = text_in(file, "policy")
    parse(text)
    return text


async def _run(verb: str, options: ServerOptions, text: str) -> None:
    bucket = subjects.POLICIES.name
    async with asking(options, "policy") as asker:
        inbox = asker.inbox
        own = await kv.get(inbox, bucket, OWN)
        if verb == "set":
            if own and parse(text).version <= parse(own.decode()).version and text.encode() != own:
                raise BadRequest(f"version {parse(text).version} is not newer than the one that holds")
            await kv.put(inbox, bucket, OWN, text.encode())
        elif verb == "rm" and options.hub:
            await kv.delete(inbox, bucket, OWN)
        elif verb == "rm":  # to devices, too; that there is no policy is not handed to them
            version = parse(own.decode()).version + 1 if own else 1
            await kv.put(inbox, bucket, OWN, f"version: {version}\notherwise: all\n".encode())
        else:
            print((own or await kv.get(inbox, bucket, "handed") or b"# all may leave\n").decode(), end="")
