"""`mnemesh doctor`: what is wrong with a mesh, and what to do about it. One function a check, in the order of dependence."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cli import contract as contracts
from cli.credentials import Credentials
from cli.permissions import allowed
from cli.server import OLDEST_SERVER, find_nats_server
from mnemesh import kv, subjects
from mnemesh.connection import Link
from mnemesh.errors import Denied, MnemeshError, NotFound
from mnemesh.ids import PARTITIONS
from mnemesh.inbox import Inbox
from mnemesh.jetstream import api, stream_state
from router.shard_map import decode_entry

PING_S = 1.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `advice` says what to do where the verdict is not `ok`."""

    verdict: Literal["ok", "warning", "wrong"]
    what: str
    advice: str = ""
