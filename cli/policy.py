"""`mnemesh policy set | show | rm`: what may leave a site, at its hub or on a device that runs.

What is set at a hub is handed to its devices. What is set on a device holds for that device's own data, whatever the
hub hands. `services/sovereignty.py` has the format.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from cli.server_config import ServerOptions, saved_options
from mnemesh import kv, subjects
from mnemesh.connection import Link
from mnemesh.errors import BadRequest, NotFound
from mnemesh.inbox import Inbox
from mnemesh.jetstream import last_of
from services.sovereignty_text import parse

OWN = "own"


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for verb, about in (("set", "what may leave, from a file"), ("show", "what holds"), ("rm", "all may leave again")):
        command = verbs.add_parser(verb, help=about)
        command.add_argument("--data", type=Path, default=data, help="folder of the site (default: %(default)s)")
    verbs.choices["set"].add_argument("file", type=Path, help="YAML or JSON")


def run(flags: argparse.Namespace) -> int:
    """Returns the exit status. Raises a `MnemeshError` that says what cannot be."""
    text = read_policy(flags.file) if flags.verb == "set" else ""
    try:
        options = saved_options(flags.data)
    except FileNotFoundError as error:
        raise BadRequest(f"{flags.data} is no site's data folder") from error
    asyncio.run(_run(flags.verb, options, text))
    return 0


def read_policy(file: Path) -> str:
    """The text of a policy file. Raises `BadRequest` that says what is wrong with it."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"cannot read the policy {file}: {error}") from error
    parse(text)
    return text


async def _run(verb: str, options: ServerOptions, text: str) -> None:
    link = await Link.open(options.credentials().load("operator").link_options("policy"))
    try:
        inbox = Inbox(link)
        await inbox.open()
        if verb == "set":
            held = await _held(inbox, OWN)
            if held and parse(text).version <= parse(held).version and text != held:
                raise BadRequest(f"version {parse(text).version} is not newer than the one that holds")
            await kv.put(inbox, subjects.POLICIES.name, OWN, text.encode())
        elif verb == "rm":
            await kv.delete(inbox, subjects.POLICIES.name, OWN)
        else:
            print(await _held(inbox, OWN) or await _held(inbox, "handed") or "# all may leave", end="")
    finally:
        await link.close()


async def _held(inbox: Inbox, copy: str) -> str:
    bucket = subjects.POLICIES.name
    try:
        stored = await last_of(inbox, f"KV_{bucket}", f"$KV.{bucket}.{copy}")
    except NotFound:
        return ""
    return stored.message.data.decode()
