"""`mnemesh consistency set | show | rm`: how fresh reads must be, by tenant and type, at a site that runs.

What is set at a hub is handed to its devices; what is set on a device holds there, whatever the hub hands. It takes
effect at once. `services/consistency_text.py` has the format. What may leave a site is another policy: `cli/policy.py`.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from cli.operator import asking, options_of
from cli.server_config import ServerOptions
from cli.verbs import add_verbs, text_in
from mnemesh import kv, subjects
from services.consistency_text import parse
from services.read_policy import HANDED, OWN

NONE = b"otherwise: eventual\n"
"""What a hub hands once it has none any more."""


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    about_rm = "as each request says, or what the hub hands"
    add_verbs(parser, data, {"set": "how fresh, from a file", "show": "what holds", "rm": about_rm})


def run(flags: argparse.Namespace) -> int:
    """Returns the exit status. Raises a `MnemeshError` that says what cannot be."""
    text = read_consistency(flags.file) if flags.verb == "set" else ""
    asyncio.run(_run(flags.verb, options_of(flags.data), text))
    return 0


def read_consistency(file: Path) -> str:
    """The text of a policy's file. Raises `BadRequest` that says what is wrong with it."""
    text = text_in(file, "consistency policy")
    parse(text)
    return text


async def _run(verb: str, options: ServerOptions, text: str) -> None:
    bucket = subjects.CONSISTENCY.name
    async with asking(options, "consistency") as asker:
        inbox = asker.inbox
        if verb == "set":
            await kv.put(inbox, bucket, OWN, text.encode())
        elif verb == "rm" and options.hub:
            await kv.delete(inbox, bucket, OWN)
        elif verb == "rm":  # to devices, too; that there is no policy is not handed to them
            await kv.put(inbox, bucket, OWN, NONE)
        else:
            print((await kv.get(inbox, bucket, OWN) or await kv.get(inbox, bucket, HANDED) or NONE).decode(), end="")
