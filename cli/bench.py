"""`mnemesh bench`: runs a suite of `bench/`."""

from __future__ import annotations

import argparse
import logging

from mnemesh.host import run as run_process


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", default="core", choices=("core", "edge", "stores"), help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=(), metavar="ROW", help="measure only what these rows need")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out; the figures mean little")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(flags: argparse.Namespace) -> int:
    """Returns the exit status; a missed goal is told, not an error."""
    return run_process(lambda stop: _bench(flags))


async def _bench(flags: argparse.Namespace) -> int:
    from bench import core, edge, report, stores

    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("bench").setLevel(logging.INFO)
    suite = {"core": core, "edge": edge, "stores": stores}[flags.suite]
    rows = await suite.run(flags.quick, flags.only)
    if flags.json:
        print(report.as_json(flags.suite, rows))
    else:
        report.show(flags.suite, rows)
    return 0
