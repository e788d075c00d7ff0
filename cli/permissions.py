"""What the contract lets each role do, as nats-server permissions, and the broker's mappings.

`allowed(contract, role)` is the one derivation; the generated configuration, the tests and `mnemesh doctor` all use it.
`<tenant>`, `<agent>` and `<site>` stay in the entries; `cli/server.py` fills them in for each user.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

Contract = dict[str, Any]

EDGE = "edge"


@dataclass(frozen=True)
class Permissions:
    """Allow lists, in nats-server's terms."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def allowed(contract: Contract, role: str) -> Permissions:
    """Everything that a role may publish and subscribe; whatever is not here the server refuses.

    No subject of the server itself is here for an agent: the server sends its answers wherever a request's reply
    subject points, past all permissions, so even `$SYS.REQ.USER.INFO` would let an agent write into the log.

    An owner may publish on the inboxes of its operations' callers. `allow_responses` is not used: it lets a reply go
    to whatever subject the caller named, the log and the JetStream API among them.
    """
    root = contract["root"]
    publish: list[str] = []
    subscribe = [f"{contract['roles'][role]['inbox']}.>"]
    identity = {"agent": ("tenant", "agent"), "edge": ("site",)}.get(role, ())
    for operation in contract["operations"].values():
        if role in operation["callers"]:
            publish.append(_wild(f"{root}.{operation['subject']}", keep=identity))
            if "mapped" in operation:
                publish.append(_wild(f"{root}.{operation['mapped']}", keep=identity))
        if role == operation["owner"]:
            subscribe.append(_wild(f"{root}.{operation.get('mapped', operation['subject'])}", keep=identity))
    for stream in contract["streams"].values():
        if role in stream["writers"]:
            publish.append(_wild(f"{root}.{stream['subjects']['event'].replace('<origin>', '<site>')}", keep=("site",)))
        if role in stream.get("carriers", ()):
            publish += [_wild(f"{root}.{subject}") for subject in stream["subjects"].values()]
        if role in stream.get("erasers", ()):
            publish += [f"$JS.API.STREAM.{verb}.{stream['name']}" for verb in ("PURGE", "MSG.DELETE")]
        if role in stream.get("uplinkers", ()):
            publish.append(_uplink(contract, stream))
        if role in stream["readers"]:
            publish += _reader(stream["name"])
    for bucket in contract["buckets"].values():
        stream_name = f"KV_{bucket['name']}"
        if role in bucket["writers"]:
            publish.append(f"$KV.{bucket['name']}.>")
        if role in bucket["readers"]:
            publish += _reader(stream_name)
    if asking := _asking(contract, role):
        publish += [f"{_wild(contract['roles'][caller]['inbox'])}.>" for caller in asking]
        subscribe.append("$SRV.>")
    if role == "operator":
        publish += ["$SRV.>", "$JS.API.>", "$JS.ACK.>", "$JS.FC.>"]
    return Permissions(tuple(publish), tuple(subscribe))


def _uplink(contract: Contract, stream: dict[str, Any]) -> str:
    return _of_site(f"{contract['root']}.{stream['uplink']['mark']}", "<origin>")


def _of_site(subject: str, token: str) -> str:
    """All that a device sends under its name, in one entry: nats-server 2.15 does not tell a leaf that may publish
    `uplink.<site>.*.*.*` of the hub's interest in `uplink.*.*.*.*`, and the message goes nowhere.
    """
    before, _, after = subject.partition(token)
    return f"{before}<site>.>" if after else f"{before}<site>"


def across(contract: Contract) -> Permissions:
    """What a hub takes from a device's server and gives to it: what the device's edge says and hears, and nothing else.

    So whoever holds a device's key can speak only for that device. What the hub asks a device has an inbox for that
    device alone, so it cannot answer what others are asked.
    """
    root = contract["root"]
    publish: list[str] = []
    subscribe = [f"{contract['roles'][EDGE]['inbox']}.>"]
    askers: list[str] = []
    for operation in contract["operations"].values():
        if operation["owner"] == EDGE and "<tenant>" in operation["subject"]:
            subscribe.append(_of_site(f"{root}.{operation['subject']}", "<site>"))
            askers += [f"{contract['roles'][caller]['inbox']}.<site>.>" for caller in operation["callers"]]
        if EDGE in operation["callers"] and contract["roles"][operation["owner"]].get("at") == "hub":
            publish.append(_of_site(f"{root}.{operation['subject']}", "<site>"))
    for stream in contract["streams"].values():
        publish.append(_uplink(contract, stream))
    return Permissions((*publish, *dict.fromkeys(askers)), tuple(subscribe))


def roles_at(contract: Contract, kind: str) -> list[str]:
    """The roles that have a user of their own at a `hub` or on a `device`."""
    return [name for name, role in contract["roles"].items() if name != "agent" and role.get("at", kind) == kind]


def _asking(contract: Contract, owner: str) -> list[str]:
    """The roles whose requests an owner answers, the operator's discovery among them; none if it owns nothing."""
    callers = {
        caller
        for operation in contract["operations"].values()
        if operation["owner"] == owner
        for caller in operation["callers"]
    }
    return [role for role in contract["roles"] if role in callers | {"operator"}] if callers else []


def _wild(template: str, keep: tuple[str, ...] = ()) -> str:
    return re.sub(r"<(\w+)>", lambda match: match.group() if match.group(1) in keep else "*", template)


def _reader(stream: str) -> list[str]:
    """The JetStream API that following one stream takes, and fetching single messages of it."""
    return [
        f"$JS.API.STREAM.INFO.{stream}",
        f"$JS.API.CONSUMER.CREATE.{stream}.>",
        f"$JS.API.CONSUMER.INFO.{stream}.*",
        f"$JS.API.CONSUMER.DELETE.{stream}.*",
        f"$JS.API.STREAM.MSG.GET.{stream}",
        f"$JS.API.DIRECT.GET.{stream}",
        f"$JS.API.DIRECT.GET.{stream}.>",
        f"$JS.FC.{stream}.>",
    ]


def permissions_conf(contract: Contract) -> str:
    """`deploy/nats/permissions.conf`: one variable a role, to be included in a server's configuration."""
    lines = [
        "# Generated from subjects.yaml; do not edit.",
        "# Include this file inside an account and name a role's variable in a user's entry:",
        "#   users: [ { user: gateway, password: $GATEWAY_PASSWORD, permissions: $gateway_permissions } ]",
        "# Templates: replace <site> by the name of the site, and <tenant> and <agent> for each agent.",
    ]
    for role in contract["roles"]:
        lines += ["", f"{role}_permissions: {{", *_block(allowed(contract, role)), "}"]
    lines += ["", "# A hub's leaf users, one a device: <site> is the device's name.", "device_permissions: {"]
    lines += [*_block(across(contract)), "}"]
    return "\n".join(lines) + "\n"


def _block(permissions: Permissions) -> list[str]:
    lines = []
    for verb, subjects in (("publish", permissions.publish), ("subscribe", permissions.subscribe)):
        lines.append(f"  {verb}: {{ allow: [")
        lines += [f'    "{subject}"' for subject in subjects]
        lines.append("  ] }")
    return lines


def user_block(permissions: Permissions, **tokens: str) -> str:
    """A role's permissions with its tokens filled in, as the value of a user's `permissions` key."""
    text = "\n".join(["{", *_block(permissions), "}"])
    return re.sub(r"<(\w+)>", lambda match: tokens[match.group(1)], text)


def mappings_conf(contract: Contract) -> str:
    """`deploy/nats/mappings.conf`: how the broker routes point reads. `<site>` is filled in for each site."""
    lines = [
        "# Generated from subjects.yaml; do not edit.",
        "# Replace <site> by the name of the site whose server this is.",
        "mappings: {",
    ]
    lines += [f'  "{source}": "{target}"' for source, target in mappings(contract).items()]
    return "\n".join([*lines, "}"]) + "\n"


def mappings(contract: Contract) -> dict[str, str]:
    """Source → destination of every mapped operation, in nats-server's mapping language."""
    rules = {}
    for operation in contract["operations"].values():
        if "mapped" not in operation:
            continue
        order = re.findall(r"<(\w+)>", operation["subject"])
        place = {token: index for index, token in enumerate(order, 1)}
        pair = f"{place['tenant']},{place['entity']}"

        def destination(match: re.Match[str], place: dict[str, int] = place, pair: str = pair) -> str:
            token = match.group(1)
            if token == "site":
                return "<site>"
            if token == "partition":
                return f"{{{{partition({contract['partitions']},{pair})}}}}"
            return f"{{{{wildcard({place[token]})}}}}"

        source = f"{contract['root']}.{re.sub(r'<[^>]+>', '*', operation['subject'])}"
        rules[source] = f"{contract['root']}.{re.sub(r'<([^>]+)>', destination, operation['mapped'])}"
    return rules
