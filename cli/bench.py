"""`mnemesh bench`: runs a suite of `bench/`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from mnemesh.host import run as run_process


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    parser.add_argument(
        "--suite", default="core", choices=("core", "edge", "stores", "gpu"), help="(default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", default=(), metavar="ROW", help="measure only what these rows need")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out; the figures mean little")
    parser.add_argument("--cold-vectors", type=int, default=0, help="in the cold start of `stores` (default: 200,000)")
    parser.add_argument(
        "--on",
        nargs="+",
        default=("cuda:", "faiss:gpu"),
        metavar="URL",
        help="where `gpu` searches vectors; cuda:numpy tries it out without one (default: cuda: faiss:gpu)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(flags: argparse.Namespace) -> int:
    """Returns the exit status; a missed goal is told, not an error."""
    return run_process(lambda stop: _bench(flags))


async def _bench(flags: argparse.Namespace) -> int:
    from bench import core, edge, gpu, report, stores

    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("bench").setLevel(logging.INFO)
    if flags.suite == "stores":
        rows = await stores.run(flags.quick, flags.only, flags.cold_vectors)
    elif flags.suite == "gpu":
        rows = await gpu.run(flags.quick, flags.only, flags.on)
    else:
        rows = await {"core": core, "edge": edge}[flags.suite].run(flags.quick, flags.only)
    if flags.json:
        print(report.as_json(flags.suite, rows))
    else:
        report.show(flags.suite, rows)
    return 0
