"""One connection to NATS, made safe to stand on: `Link`.

This file and `inbox.py`, `kv.py` and `log_*.py`, which are built on it, are the only ones that know nats-py. What
nats-py 2.16 leaves open is closed here (each has a test in `tests/test_connection.py`):

* it gives up after 60 reconnects: here it tries for ever, with jittered backoff, and pings every 5 s;
* before it reconnects it waits for the old socket to take what is buffered, which a frozen peer never does: aborted;
* a payload over the server's limit closes the client for good: here it is refused first, as `TooLarge`;
* an error callback that raises kills the read loop: ours only notes and never raises;
* a publish that the server denies looks like a timeout: here the waiting request fails as `Denied`, and `confirm`
  raises what a denied subscription would have kept silent;
* its `flush` writes the PING ahead of what is still buffered, succeeds at once while it reconnects, and kills the
  read loop if it is cancelled before the PONG comes: `flush` here does none of that, and so `drain` loses nothing;
* a publish that waits for buffer space swallows cancellation, and so do connecting (by the `wait_for` of Python 3.11,
  where the socket opens in the same round of the loop) and closing: raised again, so that budgets and Ctrl-C hold;
* a user that was removed is reconnected for ever: a second refusal closes the connection, as in nats.go;
* a connection that ends all the same sets `closed`, and the process that lives on it ends;
* it loses the connection over a message whose subject holds what it takes for a blank: read as nats-server does;
* a message passes a queue and a task on its way in, and another pair on its way out: here a callback is called where
  the message is parsed, and what is published is written in the loop's next round, as long as the socket takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import nats.errors
from nats.aio.client import DEFAULT_RECONNECT_TIME_WAIT, Client, Server
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from nats.protocol import parser

from mnemesh.errors import BadRequest, Denied, MnemeshError, TooLarge, Unavailable

logger = logging.getLogger("mnemesh.connection")

PING_INTERVAL_S = 5
PINGS_OUTSTANDING = 2
FIRST_RECONNECT_S = 0.05
LONGEST_RECONNECT_S = 2.0
CLOSE_S = 2.0
MOST_UNSENT = 64 * 1024
"""Bytes that may wait for the socket before publishers wait in nats-py's own buffer: asyncio's high-water mark."""
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


class Message:
    """What arrived on a subscription. `reply` is empty if no answer is wanted."""

    __slots__ = ("_headers", "_raw_headers", "data", "reply", "subject")

    def __init__(self, subject: str, reply: str, data: bytes, raw_headers: bytes | None = None) -> None:
        self.subject = subject
        self.reply = reply
        self.data = data
        self._raw_headers = raw_headers
        self._headers: Mapping[str, str] | None = None if raw_headers else _NO_HEADERS

    def under(self, subject: str) -> Message:
        """The same message under the subject that it was stored under."""
        return Message(subject, "", self.data, self._raw_headers)

    @property
    def status(self) -> str:
        """The server's status (ADR-4), such as `503`; empty where there is none. No header can pass for it."""
        line = (self._raw_headers or b"").partition(b"\r\n")[0]
        return line[len(_VERSION) :].strip()[:3].decode(errors="replace") if line.startswith(_VERSION) else ""

    @property
    def headers(self) -> Mapping[str, str]:
        """By name. Bytes that are not UTF-8 become U+FFFD."""
        if self._headers is None:
            assert self._raw_headers is not None  # or there would be none of them
            self._headers = _parse_headers(self._raw_headers)
        return self._headers


_VERSION = b"NATS/1.0"
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


def _parse_headers(raw: bytes) -> dict[str, str]:
    headers = {}
    for line in raw.decode(errors="replace").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip()] = value.strip()
    return headers


Callback = Callable[[Message], None]

# Whoever may name a reply subject could have a service lose its connection: nats-py takes `\v` and `\f` for blanks.
parser.MSG_RE = re.compile(rb"\AMSG[ \t]+([^ \t\r\n]+)[ \t]+([^ \t\r\n]+)[ \t]+(([^ \t\r\n]+)[ \t]+)?(\d+)\r\n")
parser.HMSG_RE = re.compile(
    rb"\AHMSG[ \t]+([^ \t\r\n]+)[ \t]+([^ \t\r\n]+)[ \t]+(([^ \t\r\n]+)[ \t]+)?(\d+)[ \t]+(\d+)\r\n"
)


@contextlib.contextmanager
def _cancellation_kept() -> Iterator[None]:
    """Raise a cancellation of the current task that what is awaited in the block swallowed."""
    task = asyncio.current_task()
    cancellations = task.cancelling() if task else 0
    yield
    if task and task.cancelling() > cancellations:
        raise asyncio.CancelledError


class _Client(Client):
    """nats-py's client without the queues between socket and callback, and which drops a dead connection at once."""

    def __init__(self) -> None:
        super().__init__()
        self._callbacks: dict[int, Callback] = {}
        self._is_writing_soon = False

    async def listen(self, subject: str, queue: str, callback: Callback) -> Subscription:
        """Subscribe; `callback` gets each message where it is parsed."""
        sid = self._sid + 1  # the id that `subscribe` takes, before it awaits anything
        self._callbacks[sid] = callback
        try:
            return await self.subscribe(subject, queue=queue)
        except BaseException:
            del self._callbacks[sid]
            raise

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        callback = self._callbacks.get(sid)
        if callback is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        try:
            callback(Message(subject.decode(errors="replace"), reply.decode(errors="replace"), data, headers))
        except Exception:  # a bug of one subscription must not end the read loop, and with it all others
            logger.exception("a callback failed on %s", subject)

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self._callbacks.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        """Write in the loop's next round all that is published in this one, as long as the socket takes it."""
        socket = self._open_socket
        if force_flush or socket is None or socket.get_write_buffer_size() > MOST_UNSENT:
            return await self._leave_to_flusher(force_flush)
        if not self._is_writing_soon:
            self._is_writing_soon = True
            asyncio.get_running_loop().call_soon(self._write_out)
        return None

    async def _leave_to_flusher(self, force_flush: bool) -> Any:
        """nats-py's own way, which waits where there is no space."""
        with _cancellation_kept():
            return await super()._flush_pending(force_flush)

    def _write_out(self) -> None:
        self._is_writing_soon = False
        socket = self._open_socket
        if socket is not None:  # else it goes out after the reconnect
            socket.writelines(self._pending)
            self._pending, self._pending_data_size = [], 0

    async def _ping_interval(self) -> None:
        """Not in step with the others: pings of a thousand connections at once are a load that is felt."""
        await asyncio.sleep(random.uniform(0, PING_INTERVAL_S))
        await super()._ping_interval()

    async def _attempt_reconnect(self) -> None:
        self.abort()
        await super()._attempt_reconnect()

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        if not self.is_connected:  # what is buffered goes nowhere; uvloop raises where it is written to a dead socket
            self._pending, self._pending_data_size = [], 0
        await super()._close(status, do_cbs)

    @property
    def _socket(self) -> asyncio.WriteTransport | None:
        """Where nats-py writes."""
        if not isinstance(self._transport, TcpTransport) or self._transport._io_writer is None:
            return None
        return self._transport._io_writer.transport

    @property
    def _open_socket(self) -> asyncio.WriteTransport | None:
        socket = self._socket if self.is_connected else None
        return None if socket is None or socket.is_closing() else socket

    def abort(self) -> None:
        """Drop the socket at once; nats-py's own `close` waits until the peer has taken what is buffered."""
        if self._socket is not None:
            self._socket.abort()


class Link:
    """A connection that reconnects for ever. Make it with `Link.open`.

    `closed` is set when it ended for good; `last_error` says why.
    """

    def __init__(self, options: LinkOptions) -> None:
        self.options = options
        self.closed = asyncio.Event()
        self.last_error: Exception | None = None
        self.reconnects = 0
        self._client = _Client()
        self._denied: list[Callable[[str], None]] = []
        self._lost: list[Callable[[], None]] = []
        self._unheard: set[str] = set()
        self._drop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._attempt = 0
        self._refusals = 0

    @classmethod
    async def open(cls, options: LinkOptions) -> Link:
        """Connect, or raise `Unavailable` (nobody there) or `Denied` (wrong user or password)."""
        link = cls(options)
        try:
            async with asyncio.timeout(options.connect_timeout_s):
                with _cancellation_kept():
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
                        allow_reconnect=False,  # at first a refusal is final; see below
                        max_reconnect_attempts=1,
                        reconnect_time_wait=0,  # where a server refuses, that is known at once
                        reconnect_to_server_handler=link._choose_server,
                        ping_interval=PING_INTERVAL_S,
                        max_outstanding_pings=PINGS_OUTSTANDING,
                    )
        except asyncio.CancelledError:
            await link.close()
            raise
        except (OSError, nats.errors.Error, TimeoutError) as error:
            cause = link.last_error or error
            await link._client.close()
            if "authorization" in f"{cause} {error}".lower():
                raise Denied(f"{options.url} does not know user {options.user!r}, or not this password") from error
            raise Unavailable(f"no NATS server answers at {options.url} ({cause or 'timed out'})") from error
        link._client.options |= {
            "allow_reconnect": True,
            "max_reconnect_attempts": -1,
            "reconnect_time_wait": DEFAULT_RECONNECT_TIME_WAIT,  # `close` waits so long for a reconnect under way
        }
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
            size += _HEADER_SLACK + sum(len(f"{name}{value}".encode()) + 4 for name, value in headers.items())
        if size > self.max_payload:
            raise TooLarge(f"the message has {size} bytes; this server takes at most {self.max_payload}")

    async def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Send one message; waits while the send buffer is full.

        Raises `TooLarge`, or `Unavailable` if the connection is closed, or down with its buffer full.
        """
        self.check_size(payload, headers)
        try:
            await self._client.publish(subject, payload, reply=reply, headers=headers)
        except nats.errors.BadSubjectError as error:
            raise BadRequest(f"{subject!r} (reply {reply!r}) is not a subject") from error
        except nats.errors.Error as error:
            raise Unavailable(f"cannot send: {error}") from error

    async def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        """Have `callback` called for each message, in order. It holds up all others, so it should only enqueue."""
        try:
            return await self._client.listen(subject, queue, callback)
        except nats.errors.Error as error:
            raise Unavailable(f"cannot subscribe to {subject}: {error}") from error

    async def confirm(self) -> None:
        """Wait until the server has taken every subscription. Raises `Denied` if it refused one, or `Unavailable`."""
        await self.flush()
        if self._unheard:
            raise Denied(f"the server does not let this user subscribe to {', '.join(sorted(self._unheard))}")

    async def drain(self, subscriptions: Sequence[Subscription]) -> None:
        """End subscriptions, once every message that the server has sent for them was called back."""
        for subscription in subscriptions:
            await self._client._send_unsubscribe(subscription._id)
        try:
            await self.flush()
        except Unavailable:
            logger.warning("%s lost the server while it drained", self.options.name)
            for subscription in subscriptions:  # a reconnect has subscribed again, or will before it sends this
                await self._client._send_unsubscribe(subscription._id)
        for subscription in subscriptions:
            self._client._remove_sub(subscription._id)

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Wait until the server has taken everything sent so far. Raises `Unavailable` if it does not."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._round_trip()
                await self._round_trip()  # the first PING overtook what was buffered; this one comes after it
        except TimeoutError as error:
            raise Unavailable(f"the server did not confirm in {timeout_s} s") from error

    async def _round_trip(self) -> None:
        socket = self._client._socket  # may have closed before nats-py knows; uvloop raises where it is written to then
        if not self.is_connected or (socket is not None and socket.is_closing()):
            raise Unavailable("the connection is down")
        pong: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        await self._client._send_ping(pong)
        waits: set[asyncio.Future[Any]] = {pong, self._drop}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)  # unlike `wait_for`, never cancels `pong`
        if not pong.done():
            raise Unavailable("the connection dropped before the server confirmed")

    async def close(self) -> None:
        """Send what is buffered, for 2 s at most, and close for good."""
        abort = asyncio.get_running_loop().call_later(CLOSE_S, self._client.abort)
        try:
            with _cancellation_kept():
                await self._client.close()
        except OSError as error:
            logger.info("%s did not close in good order: %s", self.options.name, error)
        finally:
            abort.cancel()
            self._end_waits()
            self.closed.set()

    def on_denied(self, callback: Callable[[str], None]) -> None:
        """Call back with the subject, in lower case as nats-py tells it, of each publish that the server refused."""
        self._denied.append(callback)

    def on_lost(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back whenever the connection drops: what was on its way then never arrives. Returns what ends that."""
        self._lost.append(callback)
        return lambda: self._lost.remove(callback)

    async def _on_error(self, error: Exception) -> None:
        self.last_error = error
        if violation := _VIOLATION.search(str(error)):
            verb, subject = violation.groups()
            logger.warning("the server denied %s to %s", verb, subject)
            if verb == "subscription":
                self._unheard.add(subject)
            for callback in self._denied if verb == "publish" else ():
                callback(subject)
        elif "authorization violation" in str(error).lower():
            logger.warning("%s does not let %s in: %s", self.options.url, self.options.user, error)
            self._refusals += 1
            if self._refusals > 1:
                self._client.options["max_reconnect_attempts"] = 1  # over by now, so nats-py closes the connection
        elif not self._client.is_reconnecting:
            logger.info("connection error: %s", error or type(error).__name__)

    async def _on_disconnected(self) -> None:
        self._end_waits()
        if not self._client.is_closed:
            logger.warning("%s lost %s; reconnecting", self.options.name, self.options.url)

    def _end_waits(self) -> None:
        """Nothing that was sent on the connection that is gone will be answered."""
        self._drop.set_result(None)
        self._drop = asyncio.get_running_loop().create_future()
        for callback in list(self._lost):
            callback()

    async def _on_reconnected(self) -> None:
        self._attempt = self._refusals = 0
        self._client.options["max_reconnect_attempts"] = -1
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
