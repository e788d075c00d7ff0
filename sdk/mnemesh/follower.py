"""Following a stream: every message in order from a sequence on, through whatever happens to the connection.

An ordered push consumer of our own making (ADR-17): no acks, flow control, idle heartbeats every second. A gap, a lost
connection or consumer, or a silent one, is answered by a new consumer from the last sequence + 1. Flow control is
answered when the reader has taken what came before, so a slow reader slows the server and nothing piles up.

https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-17.md
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator

import nats.errors
import nats.nuid
from nats.aio.subscription import Subscription

from mnemesh.atomic_batch import ends_whole, whole_of
from mnemesh.connection import Link, Message
from mnemesh.errors import MnemeshError
from mnemesh.inbox import Inbox
from mnemesh.jetstream import Stored, StreamState, api, stream_state

logger = logging.getLogger("mnemesh.follower")

HEARTBEAT_S = 1.0
SILENCE_S = 3.0
INACTIVE_S = 30.0
_NS = 1_000_000_000


class StreamShrank(Exception):
    """The stream ends before what the reader has seen, or is another one: what was derived from it is void."""


class Follower:
    """Reads a stream from sequence `after + 1` on.

    `incarnation` is the stream that the reader knows; if it is another now, `batches` raises `StreamShrank`. With a
    `subject`, by wildcards, only its messages are read, and the reader cannot know up to where it has seen all of them.
    One that reads `whole` writes ends no list in the midst of an atomic one.
    """

    def __init__(
        self,
        link: Link,
        inbox: Inbox,
        stream: str,
        *,
        after: int = 0,
        incarnation: str,
        subject: str = "",
        whole: bool = False,
    ) -> None:
        self._link = link
        self._inbox = inbox
        self._stream = stream
        self._incarnation = incarnation
        self._last = after
        self._subject = subject
        self._whole = whole
        self._deliver = ""
        self._subscription: Subscription | None = None
        self._buffer: deque[Stored | str] = deque()
        self._begun: list[Stored] = []
        """What was taken of a write that is still to come in part."""
        self._idle = False
        self._wake = asyncio.Event()
        self._expected = 1
        self._name = ""
        self._broken = False
        self.recreated = -1

    @property
    def waiting(self) -> int:
        """How many messages have come that the reader has not taken."""
        return len(self._buffer)

    async def batches(self, most: int) -> AsyncGenerator[list[Stored], None]:
        """Lists of 1 to `most` messages in log order, for ever; longer of whole writes. Raises `StreamShrank`."""
        forget = self._link.on_lost(self._on_lost)
        try:
            await self._create()
            while True:
                try:
                    async with asyncio.timeout(SILENCE_S):
                        await self._wake.wait()
                except TimeoutError:
                    self._broken = True
                batch = await self._take(most)
                if batch:
                    self._last = batch[-1].sequence
                    yield batch
                elif self._broken:
                    await self._create()
        finally:
            forget()
            await self._unsubscribe()

    async def _take(self, most: int) -> list[Stored]:
        """Up to `most` messages, and what else is of the last one's write, answering the flow control between them."""
        batch, self._begun = self._begun, []
        while self._buffer and (len(batch) < most or self._goes_on(batch[-1])):
            item = self._buffer.popleft()
            if isinstance(item, str):
                await self._link.publish(item, b"")
            else:
                batch.append(item)
        if batch and not self._buffer and not self._idle and self._goes_on(batch[-1]):
            batch, self._begun = _without_begun(batch)
        if not self._buffer and not self._broken:
            self._wake.clear()
        return batch

    def _goes_on(self, last: Stored) -> bool:
        """Whether more of a message's write is to come. Of one whose end was erased another message tells, or idleness.

        Messages of a batch are delivered while the server still stores it, and it then says that none follow.
        """
        if not self._whole or not (write := whole_of(last.message)) or ends_whole(last.message):
            return False
        following = next((item for item in self._buffer if not isinstance(item, str)), None)
        return following is None or whole_of(following.message) == write

    async def _create(self) -> None:
        """A fresh consumer from the last message taken, for as long as it takes to get one."""
        while True:
            try:
                await self._verify(await stream_state(self._inbox, self._stream))
                await self._unsubscribe()
                self._name = nats.nuid.NUID().next().decode()
                # No wildcard for all consumers: nats-server 2.15 does not count one as interest and delivers nothing.
                self._deliver = f"{self._link.options.inbox_prefix}.{self._name}"
                self._subscription = await self._link.subscribe(self._deliver, self._on_message)
                self._buffer.clear()
                self._begun = []
                self._wake.clear()
                self._expected = 1
                self._broken = False
                await api(
                    self._inbox,
                    ".".join(filter(None, ("CONSUMER.CREATE", self._stream, self._name, self._subject))),
                    {
                        "stream_name": self._stream,
                        "config": {
                            "name": self._name,
                            "deliver_subject": self._deliver,
                            "deliver_policy": "by_start_sequence",
                            "opt_start_seq": self._last + 1,
                            "ack_policy": "none",
                            "max_deliver": 1,
                            "flow_control": True,
                            "idle_heartbeat": int(HEARTBEAT_S * _NS),
                            "inactive_threshold": int(INACTIVE_S * _NS),
                            "mem_storage": True,
                            "num_replicas": 1,
                            **({"filter_subject": self._subject} if self._subject else {}),
                        },
                    },
                )
            except MnemeshError as error:
                logger.info("cannot follow %s yet: %s", self._stream, error.message)
                await asyncio.sleep(0.2)
            else:
                self.recreated += 1
                return

    async def _unsubscribe(self) -> None:
        if self._subscription is not None:
            with contextlib.suppress(nats.errors.Error):
                await self._subscription.unsubscribe()
            self._subscription = None

    async def _verify(self, state: StreamState) -> None:
        if state.incarnation != self._incarnation:
            raise StreamShrank(f"{self._stream} was made anew at {state.incarnation}")
        if state.last_sequence < self._last:
            raise StreamShrank(f"{self._stream} ends at {state.last_sequence}; {self._last} was read before")

    def _on_lost(self) -> None:
        """What the server sends meanwhile is gone, and with the server maybe the consumer too."""
        self._broken = True
        self._wake.set()

    def _on_message(self, message: Message) -> None:
        if message.subject.startswith(self._link.options.inbox_prefix):  # what a stream has has its own subject
            if message.subject == self._deliver:
                self._on_status(message)
            return
        fields = message.reply.split(".")
        # $JS.ACK.<stream>.<consumer>.<delivered>.<sequence>.<consumer sequence>.<ns>.<pending>; ADR-15's longer form
        # has <domain>.<account hash> before the stream and a token at the end.
        consumer, sequence, position, moment, following = (
            fields[3:4] + fields[5:9] if len(fields) == 9 else fields[5:6] + fields[7:11]
        )
        if consumer != self._name or self._broken:
            return
        if int(position) != self._expected:
            logger.warning("gap in %s: message %s, expected %d", self._stream, position, self._expected)
            self._broken = True
            self._wake.set()
            return
        self._expected += 1
        self._idle = False
        recorded_at = int(moment) // 1_000_000
        self._buffer.append(Stored(int(sequence), recorded_at, message, int(following)))
        self._wake.set()

    def _on_status(self, message: Message) -> None:
        headers = message.headers
        if message.status != "100":
            self._broken = True
        elif message.reply:
            self._buffer.append(message.reply)
        else:
            if stalled := headers.get("Nats-Consumer-Stalled"):
                self._buffer.append(stalled)
            if int(headers.get("Nats-Last-Consumer", 0)) != self._expected - 1:
                self._broken = True
            self._idle = True
        self._wake.set()


def _without_begun(batch: list[Stored]) -> tuple[list[Stored], list[Stored]]:
    """The messages before those of the last one's write, and these."""
    write = whole_of(batch[-1].message)
    begin = len(batch) - 1
    while begin and whole_of(batch[begin - 1].message) == write:
        begin -= 1
    return batch[:begin], batch[begin:]
