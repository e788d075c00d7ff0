"""The `mnemesh` command. What a subcommand's flags are, and what it does, is in the module of its name."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from cli.server import NatsServerError
from mnemesh.errors import BadRequest, MnemeshError

DATA = Path("mnemesh-data")
COMMANDS = {
    "up": "start a whole mesh on this machine",
    "run": "run one service against any NATS",
    "agent": "add, list or remove the agents that may log in",
    "edge": "devices: run one here, or say at the hub which may connect",
    "policy": "what of a site's data may leave it",
    "consistency": "how fresh reads must be, by tenant and type",
    "view": "vectors that follow from attributes",
    "erasure": "what was forgotten, and which sites have erased it",
    "snapshot": "snapshots of the shards: take one now, or list them",
    "doctor": "say what is wrong and what to do",
    "rebuild": "build a store anew from the log, while it is read",
    "contract": "generate from subjects.yaml, or check for drift",
    "demo": "the smart-grid demo on a mesh of its own",
    "bench": "measure, beside bare references in the same run",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn the errors a user can mend into one line on standard error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = parser_for(arguments).parse_args(arguments)
    try:
        _log_to_stderr(os.environ.get("MNEMESH_LOG", "INFO").upper())
        status: int = flags.run(flags)
    except (MnemeshError, NatsServerError) as error:
        print(f"mnemesh: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"mnemesh: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return status


def _log_to_stderr(level: str) -> None:
    if level not in logging.getLevelNamesMapping():
        raise BadRequest(f"MNEMESH_LOG is {level}; it may be DEBUG, INFO, WARNING or ERROR")
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it tells each instruction set that it tries


def parser_for(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """All commands by name, and the flags of the one that is asked for: a process loads no other's modules."""
    parser = argparse.ArgumentParser(prog="mnemesh", description="Shared memory for fleets of AI agents, on NATS.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, about in COMMANDS.items():
        command = commands.add_parser(name, help=about)
        if name in arguments[:1]:
            module = import_module(f"cli.{name}")
            module.add_flags(command, DATA)
            command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
