"""The `mnemesh` command. Each subcommand's flags are here; what it does is in the module of its name."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cli import agent, bench, consistency, contract, demo, doctor, edge, erasure, policy, rebuild, snapshot, up, view
from cli.run import RunOptions, run_service
from cli.server import NatsServerError
from mnemesh.client import read_credentials
from mnemesh.connection import LinkOptions
from mnemesh.errors import MnemeshError
from mnemesh.host import run as run_process

DATA = Path("mnemesh-data")
COMPRESSIONS = ("s2_auto", "s2_fast", "s2_better", "s2_best", "off")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn the errors a user can mend into one line on standard error."""
    flags = _parser().parse_args(arguments)
    logging.basicConfig(
        level=os.environ.get("MNEMESH_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mnemesh", description="Shared memory for fleets of AI agents, on NATS.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("up", help="start a whole mesh on this machine")
    up.add_flags(command, DATA)
    command.add_argument("--site", default="hub", help="the site's name (default: %(default)s)")
    command.add_argument("--region", default="", help="where the site is, for policies and for what devices want")
    command.add_argument("--leaf-port", type=int, default=0, help="where devices connect; NATS's own is 7422 (0: none)")
    command.add_argument(
        "--leaf-compression", default="s2_auto", choices=COMPRESSIONS, help="of what crosses to devices"
    )
    command.add_argument("--shards", type=int, default=2, help="how many shards (default: %(default)s)")
    command.add_argument("--replicas", type=int, default=1, help="processes of each shard (default: %(default)s)")
    up.add_store_flags(command)
    up.add_snapshot_flags(command)
    command.add_argument("--metrics-port", type=int, default=9464, help="first of the services' ports; 0: free ones")
    command.set_defaults(run=lambda flags: run_process(lambda stop: up.up(up.options(flags), stop)))

    command = commands.add_parser("run", help="run one service against any NATS")
    command.add_argument("service", choices=("gateway", "router", "shard", "hub", "views"))
    command.add_argument("--credentials", type=Path, help="credentials file of the service's role")
    command.add_argument("--url", help="NATS server (default: the credentials' own)")
    command.add_argument("--site", default="hub", help="site whose log it serves (default: %(default)s)")
    command.add_argument("--shard", default="s0", help="name in the shard map (default: %(default)s)")
    command.add_argument("--folder", type=Path, help="where the shard's stores are (default: mnemesh-data/shards/NAME)")
    up.add_store_flags(command)
    up.add_snapshot_flags(command)
    command.add_argument("--metrics-host", default="127.0.0.1")
    command.add_argument("--metrics-port", type=int, default=0, help="0: a free one, which the log names")
    command.add_argument("--until-stdin-closes", action="store_true", help="also drain when standard input ends")
    command.set_defaults(run=_run)

    command = commands.add_parser("agent", help="add, list or remove the agents that may log in")
    agent.add_flags(command, DATA)
    command.set_defaults(run=agent.run)

    command = commands.add_parser("edge", help="devices: run one here, or say at the hub which may connect")
    edge.add_flags(command, DATA)
    command.set_defaults(run=edge.run)

    command = commands.add_parser("policy", help="what of a site's data may leave it")
    policy.add_flags(command, DATA)
    command.set_defaults(run=policy.run)

    command = commands.add_parser("consistency", help="how fresh reads must be, by tenant and type")
    consistency.add_flags(command, DATA)
    command.set_defaults(run=consistency.run)

    command = commands.add_parser("view", help="vectors that follow from attributes")
    view.add_flags(command, DATA)
    command.set_defaults(run=view.run)

    command = commands.add_parser("erasure", help="what was forgotten, and which sites have erased it")
    erasure.add_flags(command, DATA)
    command.set_defaults(run=erasure.run)

    command = commands.add_parser("snapshot", help="snapshots of the shards: take one now, or list them")
    snapshot.add_flags(command, DATA)
    command.set_defaults(run=snapshot.run)

    command = commands.add_parser("doctor", help="say what is wrong and what to do")
    command.add_argument("--data", type=Path, default=DATA)
    command.add_argument("--stores", action="store_true", help="also compare every store with the log, from its start")
    command.set_defaults(run=lambda flags: asyncio.run(doctor.main(flags.data, stores=flags.stores)))

    command = commands.add_parser("rebuild", help="build a store anew from the log, while it is read")
    rebuild.add_flags(command, DATA)
    command.set_defaults(run=rebuild.run)

    command = commands.add_parser("contract", help="generate from subjects.yaml, or check for drift")
    command.add_argument("verb", choices=("generate", "check"))
    command.set_defaults(run=_contract)

    command = commands.add_parser("demo", help="the smart-grid demo on a mesh of its own")
    demo.add_flags(command)
    command.set_defaults(run=demo.run)

    command = commands.add_parser("bench", help="measure, beside bare references in the same run")
    bench.add_flags(command)
    command.set_defaults(run=bench.run)
    return parser


def _run(flags: argparse.Namespace) -> int:
    held = read_credentials(flags.credentials) if flags.credentials else {}
    options = RunOptions(
        service=flags.service,
        link=LinkOptions(
            url=flags.url or held.get("url", "nats://127.0.0.1:4222"),
            user=held.get("user"),
            password=held.get("password"),
            inbox_prefix=held.get("inbox_prefix", f"_INBOX_{flags.service}_0"),
            name=flags.service if flags.service != "shard" else f"shard {flags.shard}",
        ),
        site=flags.site,
        shard=flags.shard,
        folder=flags.folder or DATA / "shards" / flags.shard,
        stores=up.stores(flags),
        snapshots=up.snapshots(flags),
        metrics_host=flags.metrics_host,
        metrics_port=flags.metrics_port,
        until_stdin_closes=flags.until_stdin_closes,
    )
    return run_process(lambda stop: run_service(options, stop))


def _contract(flags: argparse.Namespace) -> int:
    if flags.verb == "generate":
        for path in contract.generate():
            print(f"wrote {path.relative_to(contract.ROOT)}")
        return 0
    wrong = [f"{path.relative_to(contract.ROOT)} is not what subjects.yaml says" for path in contract.drifted()]
    wrong += [f"{place} spells a subject; use mnemesh.subjects" for place in contract.spelled_elsewhere()]
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        print("run `mnemesh contract generate`", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
