"""What the contract lets each role do, as nats-server permissions, and the broker's mappings.

`allowed(contract, role)` is the one derivation; the generated configuration, the tests and `mnemesh doctor` all use it.
`<tenant>`, `<agent>` and `<site>` stay in the entries; `cli/server.py` fills them in for each user.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mnemesh.contract import SERVICE_REPLY

Contract = dict[str, Any]
Operation = dict[str, Any]

EDGE = "edge"


@dataclass(frozen=True)
class Permissions:
    """Allow lists, in nats-server's terms."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]

    @property
    def asked(self) -> tuple[str, ...]:
        """The subjects of questions among those that may be said."""
        return tuple(subject for subject in self.publish if not subject.startswith(SERVICE_REPLY))

    @property
    def answered(self) -> tuple[str, ...]:
        """The subjects of questions among those that are heard."""
        return tuple(subject for subject in self.subscribe if not subject.startswith("_INBOX"))


def allowed(contract: Contract, role: str) -> Permissions:
    """Everything that a role may publish and subscribe; whatever is not here the server refuses.

    No subject of the server itself is here for an agent: the server sends its answers wherever a request's reply
    subject points, past all permissions, so even `$SYS.REQ.USER.INFO` would let an agent write into the log.

    An owner may publish on the inboxes of its operations' callers. `allow_responses` is not used: it lets a reply go
    to whatever subject the caller named, the log and the JetStream API among them. Where the caller is across a leaf
    the reply subject is the server's own.
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
        if role in stream["readers"]:
            publish += _reader(stream["name"])
    for bucket in contract["buckets"].values():
        stream_name = f"KV_{bucket['name']}"
        if role in bucket["writers"]:
            publish.append(f"$KV.{bucket['name']}.>")
        if role in bucket["readers"]:
            publish += _reader(stream_name)
    for bucket in contract["objects"].values():
        stream_name = f"OBJ_{bucket['name']}"
        if role in bucket["writers"]:
            publish += [f"$O.{bucket['name']}.>", f"$JS.API.STREAM.PURGE.{stream_name}"]
        if role in bucket["readers"]:
            publish += _reader(stream_name)
    if asking := _asking(contract, role):
        publish += [f"{inbox}.>" for inbox in asking]
        subscribe.append("$SRV.>")
    if role == "operator":
        publish += ["$SRV.>", "$JS.API.>", "$JS.ACK.>", "$JS.FC.>"]
    return Permissions(tuple(publish), tuple(subscribe))


def _of_site(subject: str) -> str:
    """All that is asked under a device's name."""
    before, _, after = subject.partition("<site>")
    return f"{before}<site>.>" if after else f"{before}<site>"


def crosses(contract: Contract, operation: Operation) -> bool:
    """Whether an operation is asked across a leaf: by a device's edge of its hub, or by a hub of an edge."""
    if operation["owner"] == EDGE:
        return "<tenant>" in operation["subject"]
    return EDGE in operation["callers"] and contract["roles"][operation["owner"]].get("at") == "hub"


def across(contract: Contract) -> Permissions:
    """What a hub takes from a device's server and gives to it: what the device's edge says and hears, and nothing else.

    So whoever holds a device's key can speak only for that device. As services these subjects are what the account of
    the devices and that of the mesh have for each other.
    """
    root = contract["root"]
    publish: list[str] = []
    subscribe = [f"{contract['roles'][EDGE]['inbox']}.>"]
    for operation in contract["operations"].values():
        if crosses(contract, operation):
            side = subscribe if operation["owner"] == EDGE else publish
            side.append(_of_site(f"{root}.{operation['subject']}"))
    return Permissions((*publish, f"{SERVICE_REPLY}.>"), tuple(subscribe))


def roles_at(contract: Contract, kind: str) -> list[str]:
    """The roles that have a user of their own at a `hub` or on a `device`."""
    return [name for name, role in contract["roles"].items() if name != "agent" and role.get("at", kind) == kind]


def _asking(contract: Contract, owner: str) -> list[str]:
    """The inboxes that an owner answers to, that of the operator's discovery among them; none if it owns nothing."""
    owned = [operation for operation in contract["operations"].values() if operation["owner"] == owner]
    inboxes = {inbox: None for operation in owned for inbox in inboxes_of(contract, operation)}
    operator = {contract["roles"]["operator"]["inbox"]: None} if owned else {}
    return [_wild(inbox) for inbox in inboxes | operator]


def inboxes_of(contract: Contract, operation: Operation) -> list[str]:
    """Where the replies of an operation go: to its callers' inboxes, or to the server's own across a leaf."""
    if crosses(contract, operation):
        return [SERVICE_REPLY]
    return [contract["roles"][caller]["inbox"] for caller in operation["callers"]]


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


def services_conf(contract: Contract) -> str:
    """`deploy/nats/services.conf`: what a hub's accounts `MESH` and `DEVICES` have for each other."""
    crossing = across(contract)
    entries = {
        "mesh_exports": exported(crossing.asked),
        "mesh_imports": imported(crossing.answered, "DEVICES"),
        "devices_exports": exported(crossing.answered),
        "devices_imports": imported(crossing.asked, "MESH"),
    }
    lines = [
        "# Generated from subjects.yaml; do not edit.",
        "# Include this file in both accounts of a hub. In MESH: exports: $mesh_exports, imports: $mesh_imports;",
        "# in DEVICES, whose users are the leaves of devices: exports: $devices_exports, imports: $devices_imports.",
    ]
    for name, several in entries.items():
        lines += [f"{name}: [", *(f"  {entry}" for entry in several), "]"]
    return "\n".join(lines) + "\n"


def exported(subjects: Iterable[str]) -> list[str]:
    """Entries of an account's `exports`, for all sites."""
    return [f'{{ service: "{_wild(subject)}" }}' for subject in subjects]


def imported(subjects: Iterable[str], account: str) -> list[str]:
    """Entries of an account's `imports`, from another, for all sites."""
    return [f'{{ service: {{ account: {account}, subject: "{_wild(subject)}" }} }}' for subject in subjects]


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
