"""A site's nats-server in words: its options, the configuration that follows from them, and the files of both.

Written anew at each start and reload, from the options, the users (`credentials`), the devices that may connect as
leaves (`devices`) and the contract. Knows nothing of processes; those are in `server.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cli.contract import Contract
from cli.credentials import SYSTEM, Credential, Credentials
from cli.devices import Devices, seed_of
from cli.permissions import across, allowed, exported, imported, mappings, user_block
from cli.private import write_private
from mnemesh import subjects
from mnemesh.contract import fill
from mnemesh.jetstream import SiteKind

MAX_PAYLOAD = 8 * 1024 * 1024
"""As much as nats-server advises at most, and what the largest request of the contract needs."""

MAX_FILE_STORE = "1024TB"
"""The disk is the limit. nats-server's own is three quarters of what was free at its start: no writes beyond."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """Where a site's server lives and listens.

    `durability` is what a write that was acknowledged survives: `synced` a loss of power (each commit is synced to
    disk), `interval` a crash of the process (nats-server's default: a sync every 2 minutes).

    A hub takes devices on `leaf_port` (0: none). A device names its `hub` (`nats://host:7422`), and has its key in the
    data folder. `region` is where the site is. `leaf_compression` is nats-server's, of what crosses to devices.
    """

    data: Path
    site: str = "hub"
    host: str = "127.0.0.1"
    port: int = 4222
    monitoring_port: int = 8222
    durability: Literal["synced", "interval"] = "synced"
    leaf_port: int = 0
    hub: str = ""
    region: str = ""
    leaf_compression: str = "s2_auto"

    @property
    def kind(self) -> SiteKind:
        """What the site is."""
        return "device" if self.hub else "hub"

    def credentials(self, contract: Contract | None = None) -> Credentials:
        """The users of this site."""
        return Credentials(self.data, url=self.url, site=self.site, kind=self.kind, contract=contract)

    @property
    def url(self) -> str:
        """Where clients on this machine connect."""
        return f"nats://{_reachable(self.host)}:{self.port}"

    @property
    def monitoring_url(self) -> str:
        """Where the server's monitoring pages are (`/varz`, `/jsz`, `/healthz`); only on this machine."""
        return f"http://127.0.0.1:{self.monitoring_port}"


def render_config(options: ServerOptions, users: Iterable[Credential], contract: Contract) -> str:
    """The configuration of a site's server. It holds passwords: write it to a private file."""
    data = options.data.absolute()
    members, system = [], []
    for user in users:
        login = f"user: {_quoted(user.user)}, password: {_quoted(user.password)}"
        if user.role == SYSTEM:
            system.append(f"      {{ {login} }}")
        else:
            tokens = {"site": options.site, "tenant": user.tenant, "agent": user.agent}
            block = user_block(allowed(contract, user.role), **tokens)
            members.append(f"      {{ {login}, permissions: {block} }}")
    crossing = across(contract)
    devices = [
        f"      {{ nkey: {device.key}, permissions: {user_block(crossing, site=device.name)} }}"
        for device in Devices(data).list()
    ]
    routes = [
        f"      {_quoted(source)}: {_quoted(fill(target, site=options.site))}"
        for source, target in mappings(contract).items()
    ]
    sync = "    sync_interval: always" if options.durability == "synced" else ""
    leaves = []
    if options.leaf_port:
        # A device reaches its hub by the URL that it was given. The hub's own addresses may lead nowhere from there.
        listen = [f"    host: {_quoted(options.host)}", f"    port: {options.leaf_port}", "    no_advertise: true"]
        leaves = ["leafnodes {", *listen, f"    compression: {options.leaf_compression}", "}"]
    elif options.hub:
        # The logs of both sides take the same subjects: what crosses the leaf as such would be stored twice.
        closed = f"deny_exports: [{_quoted(subjects.LOG)}], deny_imports: [{_quoted(subjects.LOG)}]"
        remote = f"url: {_quoted(options.hub)}, account: MESH, nkey: {_quoted(seed_of(data))}, {closed}"
        leaves = ["leafnodes {", '    reconnect: "1s"', f"    remotes: [ {{ {remote} }} ]", "}"]
    lines = [
        "# Written by Mnemesh at each start and reload; changes are lost. Private: it holds passwords.",
        f"server_name: {_quoted(f'mnemesh-{options.site}')}",
        f"host: {_quoted(options.host)}",
        f"port: {options.port}",
        f'http: "127.0.0.1:{options.monitoring_port}"',
        f"pid_file: {_quoted(str(pid_file_of(data)))}",
        f"ports_file_dir: {_quoted(str(data))}",
        f"max_payload: {MAX_PAYLOAD}",
        'ping_interval: "5s"',
        "ping_max: 2",
        "jetstream {",
        f"    store_dir: {_quoted(str(data))}",
        f"    domain: {_quoted(options.site)}",
        f"    max_file_store: {MAX_FILE_STORE}",
        sync,
        "}",
        *leaves,
        "accounts {",
        "  MESH {",
        "    jetstream: enabled",
        "    mappings {",
        *routes,
        "    }",
        f"    exports: [ {', '.join(exported(crossing.asked))} ]",
        f"    imports: [ {', '.join(imported(crossing.answered, 'DEVICES'))} ]",
        "    users: [",
        *members,
        "    ]",
        "  }",
        "  DEVICES {",
        f"    exports: [ {', '.join(exported(crossing.answered))} ]",
        f"    imports: [ {', '.join(imported(crossing.asked, 'MESH'))} ]",
        "    users: [",
        *devices,
        "    ]",
        "  }",
        "  SYS {",
        "    users: [",
        *system,
        "    ]",
        "  }",
        "}",
        "system_account: SYS",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def write_configuration(options: ServerOptions, credentials: Credentials, contract: Contract) -> None:
    """Write a site's configuration, and the options that it came from for `reload_running`."""
    data = options.data
    held = {name: value for name, value in asdict(options).items() if name != "data"}
    write_private(_options_file(data), json.dumps(held))
    write_private(config_file(data), render_config(options, credentials.list(), contract))


def saved_options(data: Path) -> ServerOptions:
    """The options of the latest start in a folder. Raises `FileNotFoundError` if there was none."""
    return ServerOptions(data=data, **json.loads(_options_file(data).read_text()))


def config_file(data: Path) -> Path:
    """The server's configuration in a data folder."""
    return data.absolute() / "nats-server.conf"


def _options_file(data: Path) -> Path:
    return data.absolute() / "nats-server.json"


def pid_file_of(data: Path) -> Path:
    return data.absolute() / "nats-server.pid"


def log_file_of(data: Path) -> Path:
    """What the server of a data folder logs."""
    return data.absolute() / "nats-server.log"


def _reachable(host: str) -> str:
    """An address to connect to for an address to listen on."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
