"""Who may log in to a site: one private file a user under `<data>/credentials`.

Each file is a context of the `nats` command (its `--context` takes the absolute path), and
`mnemesh.connect(credentials=PATH)` reads the same. The server's users are made from these files (`cli/server.py`), so
what is not here cannot log in. The folder is the owner's alone, and a password is written nowhere else but in the
server's own configuration, which is private too. Looks at the contract and at `mnemesh`.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from cli.contract import Contract
from cli.contract import load as load_contract
from cli.permissions import roles_at
from cli.private import write_private
from mnemesh.connection import LinkOptions
from mnemesh.contract import fill
from mnemesh.errors import BadRequest, NotFound
from mnemesh.ids import check_name
from mnemesh.jetstream import SiteKind

AGENT = "agent"
SYSTEM = "sys"
"""The user of the server's system account; it is not part of the contract."""

_PASSWORD_BYTES = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Credential:
    """One user. `role` is a role of the contract, or `sys`; `tenant` and `agent` are empty unless it is an agent."""

    role: str
    user: str
    password: str
    inbox_prefix: str
    url: str
    path: Path
    tenant: str = ""
    agent: str = ""

    def link_options(self, name: str = "mnemesh") -> LinkOptions:
        """How the SDK connects as this user; `name` is what the server shows for the connection."""
        return LinkOptions(
            url=self.url, user=self.user, password=self.password, inbox_prefix=self.inbox_prefix, name=name
        )


class Credentials:
    """The users of one data folder. `url` goes into files that are written from now on.

    `kind` is what its site is: a `hub` or a `device`.
    """

    def __init__(
        self,
        data: Path,
        *,
        url: str = "nats://127.0.0.1:4222",
        site: str = "hub",
        kind: SiteKind = "hub",
        contract: Contract | None = None,
    ) -> None:
        self.folder = data.absolute() / "credentials"
        self.url = url
        self.site = site
        contract = contract or load_contract()
        self._roles: dict[str, dict[str, str]] = contract["roles"]
        self._here = roles_at(contract, kind)

    def ensure(self, role: str) -> Credential:
        """The user of a service role, of the operator, or `sys`; made at first, moved to `url` and the
        contract's inbox if it names others.

        Raises `BadRequest` for a role that the contract does not have, and for `agent` (see `add_agent`).
        """
        if role == SYSTEM:
            return self._ensure(SYSTEM, SYSTEM, "_INBOX", "the server's system account")
        if role not in self._here:
            raise BadRequest(f"no role {role!r} with a user of its own; there are {', '.join([*self._here, SYSTEM])}")
        declared = self._roles[role]
        return self._ensure(role, declared["user"], fill(declared["inbox"], site=self.site), declared["about"])

    def ensure_roles(self) -> list[Credential]:
        """Every user but the agents."""
        return [self.ensure(role) for role in (*self._here, SYSTEM)]

    def add_agent(self, tenant: str, agent: str) -> Credential:
        """The user of an agent, made at first. Raises `BadRequest` if a name is not plain."""
        names = {"tenant": check_name("tenant", tenant), "agent": check_name("agent", agent)}
        declared = self._roles[AGENT]
        user = fill(declared["user"], **names)
        return self._ensure(AGENT, user, fill(declared["inbox"], **names), f"agent {agent} of tenant {tenant}")

    def remove(self, user: str) -> None:
        """Forget a user; the server does once it is reloaded. Raises `NotFound`."""
        self.load(user).path.unlink()

    def list(self) -> list[Credential]:
        """Every user, in the order of their names."""
        return [self.load(path.stem) for path in sorted(self.folder.glob("*.json"))]

    def load(self, user: str) -> Credential:
        """One user by its name, such as `gateway` or `acme.alice`. Raises `NotFound`, or `BadRequest` on a bad file."""
        for part in user.split("."):
            check_name("user", part)
        path = self._path(user)
        try:
            held = json.loads(path.read_text())
            return self._credential(user, held["password"], held["inbox_prefix"], held["url"])
        except FileNotFoundError as error:
            raise NotFound(f"no user {user}: there is no {path}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BadRequest(f"{path} is not a credentials file of Mnemesh; remove it to have it made anew") from error

    def _ensure(self, role: str, user: str, inbox: str, about: str) -> Credential:
        try:
            held = self.load(user)
        except NotFound:
            password = secrets.token_urlsafe(_PASSWORD_BYTES)
        else:
            if (held.url, held.inbox_prefix) == (self.url, inbox):
                return held
            password = held.password
        context = {
            "description": f"Mnemesh {role}: {about}",
            "url": self.url,
            "user": user,
            "password": password,
            "inbox_prefix": inbox,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        write_private(self._path(user), json.dumps(context, indent=2) + "\n")
        return self.load(user)

    def _credential(self, user: str, password: str, inbox_prefix: str, url: str) -> Credential:
        """Agents are the users with a dot in their name, which no role has."""
        tenant, _, agent = user.partition(".")
        return Credential(
            role=AGENT if agent else user,
            user=user,
            password=password,
            inbox_prefix=inbox_prefix,
            url=url,
            path=self._path(user),
            tenant=tenant if agent else "",
            agent=agent,
        )

    def _path(self, user: str) -> Path:
        return self.folder / f"{user}.json"
