"""One connection to NATS, made safe to stand on: `Link`.

This file and `inbox.py`, `kv.py` and `log_*.py`, which are built on it, are the only ones that know nats-py. What nats-py 2.16
leaves open is closed here (each has a test in `tests/test_connection.py`):

* it gives up after 60 reconnects: here it tries for ever, with jittered backoff, and pings every 5 s;
* a payload over the server's limit closes the client for good: here it is refused first, as `TooLarge`;
* an error callback that raises kills the read loop: ours only notes and never raises;
* a publish that the server denies looks like a timeout: here the waiting request fails as `Denied`;
* a connection that ends all the same sets `closed`, and the process that lives on it ends.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import nats.errors
from nats.aio.client import Client, Server
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from mnemesh.errors import Denied, MnemeshError, TooLarge, Unavailable

logger = logging.getLogger("mnemesh.connection")

Callback = Callable[[Msg], Awaitable[None]]

PING_INTERVAL_S = 5
PINGS_OUTSTANDING = 2
FIRST_RECONNECT_S = 0.05
LONGEST_RECONNECT_S = 2.0
_HEADER_SLACK = 16
_VIOLATION = re.compile(r"permissions violation for (publish|subscription) to \"([^\"]+)\"", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkOptions:
    """How to reach NATS and as whom. `inbox_prefix` is the private inbox that the user's permissions name."""

    url: str = "nats://127.0.0.1:4222"
    user: str | None = None
    password: str | None = None
    inbox_prefix: str = "_INBOX"
    name: str = "mnemesh"
    connect_timeout_s: float = 5.0


class Link:
    """A connection that reconnects for ever. Make it with `Link.open`.

    `closed` is set when it ended for good; `last_error` says why.
    """

    def __init__(self, options: LinkOptions) -> None:
        self.options = options
        self.closed = asyncio.Event()
        self.last_error: Exception | None = None
        self.reconnects = 0
        self._client = Client()
        self._denied: list[Callable[[str], None]] = []
        self._lost: list[Callable[[], None]] = []
        self._attempt = 0

    @classmethod
    async def open(cls, options: LinkOptions) -> Link:
        """Connect, or raise `Unavailable` (nobody there) or `Denied` (wrong user or password)."""
        link = cls(options)
        try:
            async with asyncio.timeout(options.connect_timeout_s):
                await link._client.connect(
                    servers=[url.strip() for url in options.url.split(",")],
                    user=options.user,
                    password=options.password,
                    name=options.name,
                    inbox_prefix=options.inbox_prefix,
                    error_cb=link._on_error,
                    disconnected_cb=link._on_disconnected,
                    reconnected_cb=link._on_reconnected,
                    closed_cb=link._on_closed,
                    allow_reconnect=True,
                    max_reconnect_attempts=-1,
                    reconnect_to_server_handler=link._choose_server,
                    ping_interval=PING_INTERVAL_S,
                    max_outstanding_pings=PINGS_OUTSTANDING,
                )
        except (OSError, nats.errors.Error, TimeoutError) as error:
            cause = link.last_error or error
            await link._client.close()
            if "authorization" in f"{cause} {error}".lower():
                raise Denied(f"{options.url} does not know user {options.user!r}, or not this password") from error
            raise Unavailable(f"no NATS server answers at {options.url} ({cause or 'timed out'})") from error
        return link

    @property
    def client(self) -> Client:
        """The nats-py client, for the files of this package that build on it."""
        return self._client

    @property
    def is_connected(self) -> bool:
        return bool(self._client.is_connected)

    @property
    def max_payload(self) -> int:
        """The server's limit for headers and payload together, in bytes."""
        return int(self._client.max_payload)

    def check_size(self, payload: bytes, headers: dict[str, str] | None) -> None:
        """Raise `TooLarge` before nats-py would close the connection over it."""
        size = len(payload)
        if headers:
            size += _HEADER_SLACK + sum(len(name) + len(value) + 4 for name, value in headers.items())
        if size > self.max_payload:
            raise TooLarge(f"the message has {size} bytes; this server takes at most {self.max_payload}")

    async def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Send one message. Raises `TooLarge`, or `Unavailable` if the connection is closed or buffers are full."""
        self.check_size(payload, headers)
        try:
            await self._client.publish(subject, payload, reply=reply, headers=headers)
        except nats.errors.Error as error:
            raise Unavailable(f"cannot send: {error}") from error

    async def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        """Have `callback` called for each message. It must only enqueue: whatever it awaits holds up the next."""
        try:
            return await self._client.subscribe(subject, queue=queue, cb=callback)
        except nats.errors.Error as error:
            raise Unavailable(f"cannot subscribe to {subject}: {error}") from error

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Wait until the server has taken everything sent so far."""
        try:
            await self._client.flush(timeout=timeout_s)  # type: ignore[arg-type]  # annotated int, takes any number
        except (nats.errors.Error, TimeoutError) as error:
            raise Unavailable(f"the server did not confirm in {timeout_s} s: {error}") from error

    async def close(self) -> None:
        """Send what is buffered and close for good."""
        if not self._client.is_closed:
            await self._client.close()
        self.closed.set()

    def on_denied(self, callback: Callable[[str], None]) -> None:
        """Call back with the subject of each publish that the server refused."""
        self._denied.append(callback)

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call back whenever the connection drops: replies on their way then never arrive."""
        self._lost.append(callback)

    async def _on_error(self, error: Exception) -> None:
        self.last_error = error
        if violation := _VIOLATION.search(str(error)):
            verb, subject = violation.groups()
            logger.warning("the server denied %s to %s", verb, subject)
            if verb == "publish":
                for callback in self._denied:
                    callback(subject)
        elif isinstance(error, nats.errors.SlowConsumerError):
            logger.error("messages dropped: %s", error)
        elif not self._client.is_reconnecting:
            logger.info("connection error: %s", error or type(error).__name__)

    async def _on_disconnected(self) -> None:
        for callback in self._lost:
            callback()
        if not self._client.is_closed:
            logger.warning("%s lost %s; reconnecting", self.options.name, self.options.url)

    async def _on_reconnected(self) -> None:
        self._attempt = 0
        self.reconnects += 1
        logger.info("%s is connected again", self.options.name)

    async def _on_closed(self) -> None:
        self.closed.set()

    def _choose_server(self, servers: list[Server], info: object) -> tuple[Server, float]:
        """Any server, after a full-jitter backoff (AWS Architecture Blog, "Exponential Backoff and Jitter")."""
        ceiling = min(LONGEST_RECONNECT_S, FIRST_RECONNECT_S * 2 ** min(self._attempt, 16))
        self._attempt += 1
        return random.choice(servers), random.uniform(FIRST_RECONNECT_S / 2, ceiling)


def denied_error(subject: str) -> MnemeshError:
    """What a caller sees when the server refused its publish."""
    return Denied(f"the server does not let this user publish on {subject}")
