"""`mnemesh edge up | key | restamp` on a device, `enrol | revoke | ls` at its hub."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from cli import up
from cli.credentials import SYSTEM
from cli.devices import Devices, new_seed, public_of, seed_of
from cli.edge_node import EdgeNode, EdgeOptions, shard_folder
from cli.interest import read_interest
from cli.operator import asking, options_of
from cli.policy import read_policy
from cli.private import write_private
from cli.provision import put_sites, sites_of
from cli.run import stop_when_stdin_closes
from cli.server import NatsServer, monitoring, reload_running, running_pid
from cli.server_config import ServerOptions, saved_options
from edge.restamping import Restamping
from mnemesh import subjects
from mnemesh.connection import Link
from mnemesh.errors import BadRequest, NotFound, Unavailable
from mnemesh.host import run as run_process
from mnemesh.host import until_stopped
from mnemesh.ids import check_name
from mnemesh.inbox import Inbox
from mnemesh.messages import AskDevices, DeviceSeen, Interest

DEVICE_DATA = Path("mnemesh-edge")
COLUMNS = ("site", "link", "hub has", "uplink lag", "downlink lag", "holds", "log", "clock", "quarantined", "enrolled")
WIDTH = 160
KICK_S = 5.0


def add_flags(parser: argparse.ArgumentParser, hub_data: Path) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")

    verb = verbs.add_parser("up", help="on a device: run it; the hub need not be in reach")
    up.add_server_flags(verb, DEVICE_DATA)
    verb.add_argument("--site", required=True, help="the device's name")
    verb.add_argument("--hub", required=True, metavar="URL", help="its hub, such as nats://hub.example:7422")
    verb.add_argument("--metrics-port", type=int, default=9464, help="0: a free one")
    verb.add_argument("--uplink-bytes-per-s", type=float, help="most that it sends its hub")
    verb.add_argument(
        "--erase-first-after-s",
        type=float,
        default=3600.0,
        help="after how long an absence it erases what was forgotten before it serves (default: %(default)s)",
    )
    verb.add_argument("--until-stdin-closes", action="store_true", help="also drain when standard input ends")
    verb.add_argument("--interest", type=Path, metavar="FILE", help="what it is to hold of what was written elsewhere")
    verb.add_argument("--region", default="", help="where it is, for policies, beside what its hub says")
    verb.add_argument(
        "--policy", type=Path, metavar="FILE", help="what of its own data may leave, whatever its hub says"
    )

    on_device = {
        "key": "on a device: print its public key, which the hub enrols",
        "restamp": "on a stopped device whose clock is right again: stamp anew what it wrote while it was ahead",
    }
    for name, about in on_device.items():
        folder = verbs.add_parser(name, help=about).add_argument("--data", type=Path, default=DEVICE_DATA)
        folder.help = "the device's folder (default: %(default)s)"

    verb = verbs.add_parser("enrol", help="at the hub: let a device connect under a name")
    verb.add_argument("name")
    verb.add_argument("--key", help="the device's public key; without it a pair is made here, to be carried there")
    verb.add_argument("--tenant", action="append", default=[], help="whose memory it may have; repeat (default: all)")
    verb.add_argument("--region", default="", help="where it is, for policies and for what others want")

    verb_of = {"revoke": "at the hub: end a device's access at once", "ls": "at the hub: list its devices"}
    for name, about in verb_of.items():
        verbs.add_parser(name, help=about)
    verbs.choices["revoke"].add_argument("name")
    for name in ("enrol", *verb_of):
        folder = verbs.choices[name].add_argument("--data", type=Path, default=hub_data)
        folder.help = "the hub's folder (default: %(default)s)"


def run(flags: argparse.Namespace) -> int:
    """Returns the exit status. Raises a `MnemeshError` that says what cannot be."""
    if flags.verb == "up":
        return run_process(lambda stop: _up(_options(flags), stop, until_stdin_closes=flags.until_stdin_closes))
    if flags.verb == "key":
        print(public_of(seed_of(flags.data)))
        return 0
    if flags.verb == "restamp":
        asyncio.run(restamp(_device(flags.data)))
        return 0
    options = _hub(flags.data)
    devices = Devices(flags.data)
    if flags.verb == "ls":
        asyncio.run(_list(devices, options))
        return 0
    if flags.verb == "revoke":
        _revoke(devices, options, flags.name)
    else:
        _enrol(devices, options, flags)
        _tell_sites(options)  # before it may connect
        asyncio.run(reload_running(flags.data))
    return 0


def _revoke(devices: Devices, options: ServerOptions, name: str) -> None:
    """Shut a device out; also one that is not enrolled any more, for what comes after that may have failed."""
    missing: NotFound | None = None
    try:
        devices.revoke(name)
    except NotFound as error:
        missing = error
    _tell_sites(options)
    asyncio.run(shut_out(options))
    if missing is not None:
        raise NotFound(f"no device {name} is enrolled; if it was still connected, it is out now") from missing


def _tell_sites(options: ServerOptions) -> None:
    """Let the services of a running hub know what is said of its devices."""
    if running_pid(options.data) is not None:
        asyncio.run(put_sites(options.credentials().load("operator").link_options("sites"), sites_of(options)))


def _options(flags: argparse.Namespace) -> EdgeOptions:
    if not flags.hub.startswith(("nats://", "tls://", "ws://", "wss://")):
        raise BadRequest(f"--hub {flags.hub}: expected a URL such as nats://hub.example:7422")
    if flags.uplink_bytes_per_s is not None and flags.uplink_bytes_per_s <= 0:
        raise BadRequest("--uplink-bytes-per-s must be more than 0")
    tenants, agents = up.users(flags)
    return EdgeOptions(
        server=up.server_options(flags, hub=flags.hub),
        tenants=tenants,
        agents=agents,
        metrics_port=flags.metrics_port,
        uplink_bytes_per_s=flags.uplink_bytes_per_s,
        interest=read_interest(flags.interest) if flags.interest else Interest(),
        policy=read_policy(flags.policy) if flags.policy else None,
        erase_first_after_s=flags.erase_first_after_s,
    )


async def _up(options: EdgeOptions, stop: asyncio.Event, *, until_stdin_closes: bool) -> int:
    if until_stdin_closes:
        await stop_when_stdin_closes(stop)
    await until_stopped(stop, _serve(options))
    print("stopped; all that was acknowledged is in the data folder", flush=True)
    return 0


async def _serve(options: EdgeOptions) -> None:
    key = public_of(seed_of(options.server.data))
    async with EdgeNode(options) as node:
        print(_greeting(node, key), flush=True)
        try:
            await node.ended()
        finally:
            print("draining …", flush=True)


def _greeting(node: EdgeNode, key: str) -> str:
    options = node.options
    server = options.server
    lines = [
        f"mnemesh edge {server.site} is up, whether or not its hub {server.hub} is in reach",
        f"  connect      {server.url}",
        *(f"  credentials  {node.server.credentials.load('.'.join(agent)).path}" for agent in options.agents),
        f"  monitoring   {server.monitoring_url}",
        f"  metrics      http://127.0.0.1:{node.metrics_port}/metrics",
        f"  key          {key}",
        f"At the hub, once: mnemesh edge enrol {server.site} --key and this key. Ctrl-C drains and stops.",
    ]
    return "\n".join(lines)


async def restamp(options: ServerOptions) -> int:
    """Stamp anew what the device of this folder wrote while its clock was ahead; returns how many events that were."""
    if running_pid(options.data) is not None:
        raise BadRequest(f"{options.site} runs; stop it first")
    shutil.rmtree(shard_folder(options), ignore_errors=True)  # it comes back from the log
    async with (
        NatsServer(options),
        asking(options, "restamp", role="gateway") as writer,
        asking(options, "restamp", role="edge") as eraser,
    ):
        count = await Restamping(writer, eraser, site=options.site).run()
    print(f"{count:,} events of {options.site} were stamped ahead of its clock, and are stamped now")
    return count


def _device(data: Path) -> ServerOptions:
    options = options_of(data)
    if not options.hub:
        raise BadRequest(f"{data} is a mesh of its own, not a device")
    return options


def _hub(data: Path) -> ServerOptions:
    try:
        options = saved_options(data)
    except FileNotFoundError as error:
        raise BadRequest(f"{data} is no mesh's data folder; `mnemesh up --data {data} --leaf-port 7422`") from error
    if not options.leaf_port:
        raise BadRequest(f"the mesh of {data} takes no devices; start it with `mnemesh up --leaf-port 7422`")
    return options


async def _list(devices: Devices, options: ServerOptions) -> None:
    """What is enrolled, and what the hub has heard of each, if it runs."""
    seen = {device.site: device for device in await _seen(options)}
    table = Table(*COLUMNS, box=None)
    for device in devices.list():
        heard = seen.pop(device.name, None)
        table.add_row(device.name, *_told(heard), device.enrolled_at)
    for site, heard in seen.items():
        table.add_row(site, *_told(heard), "revoked")
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def _told(heard: DeviceSeen | None) -> list[str]:
    if heard is None:
        return ["never", *[""] * (len(COLUMNS) - 3)]
    link = "linked" if heard.linked else f"silent for {heard.silent_s:.0f} s"
    return [
        link,
        str(heard.uplinked),
        _lag(heard.waiting, heard.lag_s),
        _lag(heard.downlink_waiting, heard.downlink_lag_s),
        "" if heard.held is None else f"{heard.held} ({decimal(heard.held_bytes or 0)})",
        "" if heard.log_bytes is None else decimal(heard.log_bytes),
        "" if heard.clock_offset_ms is None else f"{heard.clock_offset_ms / 1000:+.1f} s",
        str(heard.quarantined),
    ]


def _lag(events: int | None, seconds: float | None) -> str:
    """So many events, the oldest of them for so long."""
    if events is None:
        return ""
    return str(events) if not events or seconds is None else f"{events}, {seconds:.1f} s"


async def _seen(options: ServerOptions) -> list[DeviceSeen]:
    try:
        async with asking(options, "edge ls") as asker:
            return (await asker.ask(subjects.DEVICES, subjects.devices(), AskDevices(quarantined=True))).devices
    except Unavailable:
        return []


async def shut_out(options: ServerOptions) -> None:
    """Have a running server forget whom the files do not name any more.

    A reload leaves its leaves connected, and they name themselves. So all are disconnected; the others are back in a
    second. Raises `Unavailable` where one may still be connected.
    """
    if not await reload_running(options.data):
        return
    leaves = await _leaves(options)
    stayed: set[int] = set()
    link = await Link.open(options.credentials().load(SYSTEM).link_options("revoke"))
    try:
        inbox = Inbox(link)
        await inbox.open()
        server = (await monitoring(options, "/varz")).get("server_id")
        for leaf in leaves:
            kick = json.dumps({"cid": leaf}).encode()
            told = await inbox.request(f"$SYS.REQ.SERVER.{server}.KICK", kick, budget_s=KICK_S)
            if "error" in json.loads(told.data):
                stayed.add(leaf)
    finally:
        await link.close()
    if stayed and stayed & await _leaves(options):  # others went by themselves
        raise Unavailable("the server did not disconnect every device; revoke it again")


async def _leaves(options: ServerOptions) -> set[int]:
    """The connections of devices. Raises `Unavailable` where the server does not say which there are."""
    told = await monitoring(options, "/leafz")
    if "leafs" not in told:
        raise Unavailable("the server does not say which devices are connected; revoke it again")
    return {leaf["id"] for leaf in told["leafs"] or ()}


def _enrol(devices: Devices, options: ServerOptions, flags: argparse.Namespace) -> None:
    name, key = check_name("device", flags.name), flags.key
    if name == options.site:
        raise BadRequest(f"{name} is the hub's own name")
    region = flags.region and check_name("region", flags.region)
    tenants = [check_name("tenant", tenant) for tenant in flags.tenant]
    if key is not None:
        devices.enrol(name, key, region=region, tenants=tenants)
        print(f"{name} is enrolled; on the device: mnemesh edge up --site {name} --hub nats://HOST:{options.leaf_port}")
        return
    seed = new_seed()
    devices.enrol(name, public_of(seed), region=region, tenants=tenants)
    file = Path(f"{name}.nk")
    write_private(file, seed + "\n")
    print(f"{name} is enrolled; carry {file} to the device, as device.nk in its data folder, and remove it here")
