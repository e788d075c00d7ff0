"""`mnemesh contract generate | check`: what is generated from `subjects.yaml`, and whether it has drifted.

One function a generated file; `FILES` says which file each one writes. Permissions are in `cli/permissions.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import yaml

from cli.permissions import inboxes_of, mappings_conf, permissions_conf, services_conf
from mnemesh import messages

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(__file__).with_name("subjects.yaml")  # the one at the root, by a link; a wheel holds a copy
Contract = dict[str, Any]


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    parser.add_argument("verb", choices=("generate", "check"))


def run(flags: argparse.Namespace) -> int:
    """Returns the exit status."""
    if flags.verb == "generate":
        for path in generate():
            print(f"wrote {path.relative_to(ROOT)}")
        return 0
    wrong = [f"{path.relative_to(ROOT)} is not what subjects.yaml says" for path in drifted()]
    wrong += [f"{place} spells a subject; use mnemesh.subjects" for place in spelled_elsewhere()]
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        print("run `mnemesh contract generate`", file=sys.stderr)
    return 1 if wrong else 0


def load(source: Path = SOURCE) -> Contract:
    """The contract as plain data, checked: every type exists, every role and token is declared."""
    contract: Contract = yaml.safe_load(source.read_text())
    for name, operation in contract["operations"].items():
        for kind in (operation["request"], operation["reply"]):
            if not hasattr(messages, kind):
                raise ValueError(f"{name}: mnemesh.messages has no type {kind}")
        for role in (operation["owner"], *operation["callers"]):
            if role not in contract["roles"]:
                raise ValueError(f"{name}: no role {role}")
        if operation["owner"] == "hub" and "edge" in operation["callers"] and "<site>" not in operation["subject"]:
            raise ValueError(f"{name}: what devices ask a hub must name the device")
        for token in re.findall(r"<(\w+)>", operation["subject"] + operation.get("mapped", "")):
            if token not in contract["tokens"]:
                raise ValueError(f"{name}: no token {token}")
    return contract


def subjects_py(contract: Contract) -> str:
    """`sdk/mnemesh/subjects.py`: builders and the operation table."""
    root = contract["root"]
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    lines = [
        '"""Subject builders and the operation table. Generated from `subjects.yaml`; do not edit."""',
        "",
        "from __future__ import annotations",
        "",
        "# fmt: off",
        "from mnemesh import messages",
        "from mnemesh.contract import AnyOperation, Bucket, Operation",
        "",
        f'CONTRACT = "{digest}"',
        '"""Hash of the contract that this code was generated from."""',
        "",
    ]
    for name, operation in contract["operations"].items():
        subject = f"{root}.{operation['subject']}"
        served = f"{root}.{operation.get('mapped', operation['subject'])}"
        lines += [
            f"{name.upper()} = Operation(",
            f'    name="{name}",',
            f'    owner="{operation["owner"]}",',
            f"    callers={_tuple(operation['callers'])},",
            f"    inboxes={_tuple(inboxes_of(contract, operation))},",
            f'    subject="{subject}",',
            f'    served="{served}",',
            f"    request=messages.{operation['request']},",
            f"    reply=messages.{operation['reply']},",
            f"    budget_ms={operation['budget_ms']},",
            f"    max_bytes={operation['max_bytes']},",
            f'    idempotent="{operation["idempotent"]}",',
            f"    concurrency={operation['concurrency']},",
            f"    mailbox={operation['mailbox']},",
            *([f"    per_site={operation['per_site']},"] if "per_site" in operation else []),
            ")",
        ]
    lines += ["", "OPERATIONS: dict[str, AnyOperation] = {"]
    lines += [f'    "{name}": {name.upper()},' for name in contract["operations"]]
    lines += ["}", ""]
    for name, bucket in contract["buckets"].items():
        lines.append(f'{name.upper()} = Bucket(name="{bucket["name"]}", about="{bucket["about"]}")')
    lines += ["", f"BUCKETS = ({', '.join(name.upper() for name in contract['buckets'])})", ""]
    for name, bucket in contract["objects"].items():
        lines.append(f'{name.upper()} = Bucket(name="{bucket["name"]}", about="{bucket["about"]}")')
    lines += ["", f"OBJECTS = ({', '.join(name.upper() for name in contract['objects'])},)", ""]
    for name, stream in contract["streams"].items():
        windows = ", ".join(f'"{kind}": {seconds}' for kind, seconds in stream["duplicate_window_s"].items())
        lines += ["", f"{name.upper()}_DUPLICATE_WINDOW_S = {{{windows}}}", ""]
        lines += _builder(f"{name}_stream", "the stream", stream["name"])
        lines += ["", f'{name.upper()} = "{root}.{stream["subjects"]["mark"].partition(".")[0]}.>"', ""]
        for part, subject in stream["subjects"].items():
            lines += _builder(f"{name}_{part}", f"subject of {part}s in the {name}", f"{root}.{subject}")
    for name, role in contract["roles"].items():
        lines += _builder(f"{name}_inbox", f"inbox prefix of {name}: {role['about']}", role["inbox"])
        lines += _builder(f"{name}_user", f"user name of {name}", role["user"])
    for name, operation in contract["operations"].items():
        lines += _builder(name, operation["summary"], f"{root}.{operation['subject']}")
    return "\n".join(lines).rstrip() + "\n"


def _builder(name: str, about: str, template: str) -> list[str]:
    tokens = re.findall(r"<(\w+)>", template)
    body = re.sub(r"<(\w+)>", r"{\1}", template)
    signature = ", ".join(f"{token}: {'int | str' if token == 'partition' else 'str'}" for token in tokens)
    return [
        "",
        f"def {name}({signature}) -> str:",
        f'    """{about[0].upper()}{about[1:].rstrip(".")}."""',
        f'    return {"f" if tokens else ""}"{body}"',
        "",
    ]


def _tuple(texts: Iterable[str]) -> str:
    return "(" + "".join(f'"{text}", ' for text in texts)[:-1] + ")"


def asyncapi(contract: Contract) -> str:
    """`docs/asyncapi.yaml`: one channel and one operation (from the owner's side: receive, reply) an entry."""
    root = contract["root"]
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    kinds: set[str] = set()
    for name, operation in contract["operations"].items():
        address = f"{root}.{operation['subject']}"
        tokens = re.findall(r"<(\w+)>", address)
        kinds |= {operation["request"], operation["reply"]}
        channels[name] = {
            "address": re.sub(r"<(\w+)>", r"{\1}", address),
            "messages": {
                "request": {"$ref": f"#/components/messages/{operation['request']}"},
                "reply": {"$ref": f"#/components/messages/{operation['reply']}"},
            },
            "parameters": {token: {"description": contract["tokens"][token]} for token in tokens},
        }
        operations[name] = {
            "action": "receive",
            "summary": operation["summary"],
            "channel": {"$ref": f"#/channels/{name}"},
            "messages": [{"$ref": f"#/channels/{name}/messages/request"}],
            "reply": {
                "channel": {"$ref": f"#/channels/{name}"},
                "messages": [{"$ref": f"#/channels/{name}/messages/reply"}],
            },
            "x-owner": operation["owner"],
            "x-callers": operation["callers"],
            "x-budget-ms": operation["budget_ms"],
            "x-max-bytes": operation["max_bytes"],
            "x-idempotent": operation["idempotent"],
        }
    ordered = sorted(kinds)
    _, schemas = msgspec.json.schema_components(
        [getattr(messages, kind) for kind in ordered],
        schema_hook=lambda kind: {"type": "array", "items": {"type": "number"}, "description": "a vector"},
        ref_template="#/components/schemas/{name}",
    )
    document = {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Mnemesh",
            "version": root.rsplit(".", 1)[-1].removeprefix("v") + ".0.0",
            "description": "Shared memory for fleets of AI agents, on NATS. Payloads are MessagePack maps, or "
            "JSON where the payload begins with '{'.",
        },
        "defaultContentType": "application/msgpack",
        "channels": channels,
        "operations": operations,
        "components": {
            "messages": {kind: {"name": kind, "payload": {"$ref": f"#/components/schemas/{kind}"}} for kind in ordered},
            "schemas": schemas,
        },
    }
    note = "# Generated from subjects.yaml; do not edit.\n"
    return note + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)


FILES: dict[Path, Callable[[Contract], str]] = {
    ROOT / "sdk/mnemesh/subjects.py": subjects_py,
    ROOT / "deploy/nats/permissions.conf": permissions_conf,
    ROOT / "deploy/nats/mappings.conf": mappings_conf,
    ROOT / "deploy/nats/services.conf": services_conf,
    ROOT / "docs/asyncapi.yaml": asyncapi,
}


def generate() -> list[Path]:
    """Write every generated file; return those that changed."""
    contract = load()
    changed = []
    for path, render in FILES.items():
        text = render(contract)
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            changed.append(path)
    return changed


def drifted() -> list[Path]:
    """The generated files that are not what the contract says."""
    contract = load()
    return [path for path, render in FILES.items() if not path.exists() or path.read_text() != render(contract)]


_SUBJECT = re.compile(r"mnemesh\.v\d+\.")


def spelled_elsewhere() -> list[str]:
    """Places outside the contract and its generated files that spell a subject (`path:line`)."""
    places = []
    for folder in ("sdk", "memory_shards", "router", "services", "edge", "cli", "bench", "examples", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path in FILES:
                continue
            places += [
                f"{path.relative_to(ROOT)}:{number}"
                for number, line in enumerate(path.read_text().splitlines(), 1)
                if _SUBJECT.search(line)
            ]
    return places
