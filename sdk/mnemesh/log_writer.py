"""Appending to the log: group commit by atomic batches.

Whatever is appended while a commit is under way goes into the next one, so batches grow with the load and a lone write
waits for nobody. One sync then pays for the whole batch. nats-server stages a batch before it stores it, which costs
some syncs more; so where a sync is fast, a few messages are sooner stored one by one, and `Pace` tells how many.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import nats.nuid

from mnemesh.atomic_batch import MOST_BYTES_IN_BATCH, MOST_IN_BATCH, ROLLUP, WHOLE, Outgoing, publish_batch
from mnemesh.connection import Link
from mnemesh.errors import Busy, Conflict, MnemeshError, TooLarge, Unavailable
from mnemesh.inbox import Inbox
from mnemesh.jetstream import WRONG_LAST_ID, JetStreamError, NoBatch, check, is_refused_batch

MESSAGE_ID = "Nats-Msg-Id"
EXPECTED = "Nats-Expected-Last-Subject-Sequence"
COMPARED = "Nats-Expected-Last-Subject-Sequence-Subject"
EXPECTED_ID = "Nats-Expected-Last-Msg-Id"
MOST_WAITING = 65_536
COMMIT_S = 5.0
SMALL_BATCH = 32
LEARN_EVERY = 256


class Append(NamedTuple):
    """One message to append. `expected` is the subject's last sequence for compare-and-set (0: there is none).

    With `compared` it is the last of these subjects, by wildcards, instead. What has one `message_id` is stored once.
    A rollup among the `headers` erases what the subject held before, in the same commit.
    """

    subject: str
    payload: bytes
    message_id: str
    expected: int | None = None
    headers: Mapping[str, str] = {}
    compared: str = ""


class Position(NamedTuple):
    """Where an append landed. `duplicate`: the id was there already, and this is where."""

    sequence: int
    duplicate: bool


class _Group(NamedTuple):
    """Appends that one caller waits for. `atomic` ones travel in a batch of their own."""

    appends: Sequence[Append]
    atomic: bool
    done: asyncio.Future[list[Position | MnemeshError]]


class Pace:
    """How long commits take lately, in seconds: moving averages, for one message stored on its own and for a batch."""

    def __init__(self) -> None:
        self._one_s: float | None = None
        self._batch_s: float | None = None
        self._chosen = 0

    def is_sooner_singly(self, count: int) -> bool:
        """Whether so many are likely stored sooner one by one. Now and then no, to learn what a batch takes now."""
        if count == 1:
            return True
        if self._one_s is None or self._batch_s is None or count * self._one_s >= self._batch_s:
            return False
        self._chosen += 1
        return self._chosen % LEARN_EVERY != 0

    def took_singly(self, count: int, seconds: float) -> None:
        self._one_s = _moved(self._one_s, seconds / count)

    def took_as_batch(self, count: int, seconds: float) -> None:
        """A large batch says nothing about a small one."""
        if count <= SMALL_BATCH:
            self._batch_s = _moved(self._batch_s, seconds)


def _moved(average: float | None, latest: float) -> float:
    return latest if average is None else 0.9 * average + 0.1 * latest


class LogWriter:
    """Appends to one log. `run` must be running (it is the gateway's background work)."""

    def __init__(self, link: Link, inbox: Inbox) -> None:
        self._link = link
        self._inbox = inbox
        self._groups: deque[_Group] = deque()
        self._waiting = 0
        self._wake = asyncio.Event()
        self._stopped = False
        self._nuid = nats.nuid.NUID()
        self._pace = Pace()
        self.commits = 0
        self.appended = 0

    @property
    def waiting(self) -> int:
        """How many appends wait for the next commit."""
        return self._waiting

    async def append(self, append: Append) -> Position:
        """Append one message. Raises `Conflict`, `Busy`, or what the connection raises."""
        (outcome,) = await self._enqueue([append], atomic=False)
        if isinstance(outcome, MnemeshError):
            raise outcome
        return outcome

    async def append_each(self, appends: Sequence[Append]) -> list[Position | MnemeshError]:
        """Append many, each on its own: a position or an error for each, in order."""
        return await self._enqueue(appends, atomic=False) if appends else []

    async def append_all(self, appends: Sequence[Append]) -> list[Position]:
        """Append all (at most 1,000) or none, as one write. Raises `Conflict` if any compare-and-set failed, or any id
        is taken."""
        if len(appends) > MOST_IN_BATCH:
            raise TooLarge(f"at most {MOST_IN_BATCH} messages can be appended as one; these are {len(appends)}")
        if len(appends) > 1:
            appends = [append._replace(headers={**append.headers, WHOLE: "1"}) for append in appends]
        outcomes = await self._enqueue(appends, atomic=True) if appends else []
        positions = []
        for outcome in outcomes:
            if isinstance(outcome, MnemeshError):
                raise outcome
            positions.append(outcome)
        return positions

    async def run(self) -> None:
        """Commit for ever. A failed commit fails those who wait for it, and only them; the end fails all who wait."""
        self._stopped = False
        batch: list[_Group] = []
        try:
            while True:
                await self._wake.wait()
                batch = self._take()
                appends = [append for group in batch for append in group.appends]
                try:
                    outcomes = await self._commit(appends, atomic=batch[0].atomic)
                except MnemeshError as error:
                    outcomes = [error] * len(appends)
                self._hand_out(batch, outcomes)
        finally:
            self._stopped = True
            for group in (*batch, *self._groups):
                if not group.done.done():
                    group.done.set_exception(Unavailable("the log writer has stopped", retry_after_ms=100))
            self._groups.clear()
            self._waiting = 0
            self._wake.clear()

    async def _enqueue(self, appends: Sequence[Append], *, atomic: bool) -> list[Position | MnemeshError]:
        if self._stopped:
            raise Unavailable("the log writer has stopped", retry_after_ms=100)
        if self._waiting + len(appends) > MOST_WAITING:
            raise Busy(f"{self._waiting} writes wait for the log already", retry_after_ms=100)
        done: asyncio.Future[list[Position | MnemeshError]] = asyncio.get_running_loop().create_future()
        self._groups.append(_Group(appends, atomic, done))
        self._waiting += len(appends)
        self._wake.set()
        return await done

    def _take(self) -> list[_Group]:
        """The groups for one commit: one atomic group alone, or others up to a batch. A large group is alone too."""
        batch = [self._groups.popleft()]
        count = len(batch[0].appends)
        size = _size(batch[0])
        while self._groups and not batch[0].atomic and not self._groups[0].atomic:
            count += len(self._groups[0].appends)
            size += _size(self._groups[0])
            if count > MOST_IN_BATCH or size > MOST_BYTES_IN_BATCH:
                break
            batch.append(self._groups.popleft())
        self._waiting -= sum(len(group.appends) for group in batch)
        if not self._groups:
            self._wake.clear()
        return batch

    async def _commit(self, appends: Sequence[Append], *, atomic: bool) -> list[Position | MnemeshError]:
        if atomic:
            return list(await self._publish_all(appends))
        outcomes: list[Position | MnemeshError] = []
        now = asyncio.get_running_loop().time
        for chunk in _chunks(appends):
            began = now()
            if self._pace.is_sooner_singly(len(chunk)):
                stored = await self._publish_singly(chunk)
                if not any(isinstance(outcome, MnemeshError) for outcome in stored):  # to fail may take no time at all
                    self._pace.took_singly(len(chunk), now() - began)
                outcomes += stored
                continue
            try:
                outcomes += await self._publish_batch(chunk)
                self._pace.took_as_batch(len(chunk), now() - began)
            except MnemeshError as error:
                if is_refused_batch(error) or isinstance(error, NoBatch):
                    outcomes += await self._publish_singly(chunk)
                else:
                    outcomes += [error] * len(chunk)
        return outcomes

    async def _publish_all(self, appends: Sequence[Append]) -> Sequence[Position]:
        """All or none, and once: the retry of a batch whose ack was lost finds all of it there."""
        try:
            return await self._publish_batch(appends)
        except MnemeshError as error:
            if not is_refused_batch(error):
                raise
            found = await asyncio.gather(*(self._find(append) for append in appends))
            stored = [position for position in found if position is not None]
            if len(stored) == len(appends):
                return stored
            if isinstance(error, Conflict):
                raise
            raise Conflict("an id of this batch holds another write already, or is there twice") from error

    async def _publish_batch(self, appends: Sequence[Append]) -> list[Position]:
        """One atomic batch: all stored at consecutive sequences, or none."""
        if len(appends) == 1:
            outcome = await self._publish_one(appends[0])
            if isinstance(outcome, MnemeshError):
                raise outcome
            return [outcome]
        members = [Outgoing(append.subject, append.payload, _headers(append)) for append in appends]
        first = await publish_batch(self._link, self._inbox, members, budget_s=COMMIT_S)
        self.commits += 1
        self.appended += len(appends)
        return [Position(first + offset, False) for offset in range(len(appends))]

    async def _publish_singly(self, appends: Sequence[Append]) -> list[Position | MnemeshError]:
        """Each on its own, all under way at once; the server keeps their order."""
        if len(appends) == 1:
            return [await self._publish_one(appends[0])]
        return await asyncio.gather(*(self._publish_one(append) for append in appends))

    async def _publish_one(self, append: Append) -> Position | MnemeshError:
        try:
            try:
                message = await self._inbox.request(
                    append.subject, append.payload, budget_s=COMMIT_S, headers=_headers(append)
                )
                ack = check(json.loads(message.data))
            except Conflict as error:
                return await self._find(append) or error
        except MnemeshError as error:
            return error
        if not (duplicate := ack.get("duplicate", False)):
            self.commits += 1
            self.appended += 1
        return Position(ack["seq"], duplicate)

    async def _find(self, append: Append) -> Position | None:
        """Where the id of an append is in the log, if it is.

        A compare-and-set that is tried again fails against its own first try: nats-server 2.15 checks it before it
        looks for the id. So ask with a message that can only be a duplicate: it expects to follow an id that nothing
        has, which the server checks after it has looked for the message's own.
        """
        headers = {MESSAGE_ID: append.message_id, EXPECTED_ID: self._nuid.next().decode()}
        message = await self._inbox.request(append.subject, b"", budget_s=COMMIT_S, headers=headers)
        try:
            return Position(check(json.loads(message.data))["seq"], True)
        except JetStreamError as error:
            if error.err_code != WRONG_LAST_ID:
                raise
            return None

    def _hand_out(self, batch: Sequence[_Group], outcomes: Sequence[Position | MnemeshError]) -> None:
        start = 0
        for group in batch:
            end = start + len(group.appends)
            if not group.done.done():
                group.done.set_result(list(outcomes[start:end]))
            start = end


def _headers(append: Append) -> dict[str, str]:
    headers = {MESSAGE_ID: append.message_id, **append.headers}
    if append.expected is not None:
        headers[EXPECTED] = str(append.expected)
        if append.compared:
            headers[COMPARED] = append.compared
    return headers


def _size(group: _Group) -> int:
    return sum(len(append.payload) for append in group.appends)


def _chunks(appends: Sequence[Append]) -> list[Sequence[Append]]:
    """Runs of at most a batch, each subject with a compare-and-set or a rollup at most once in its run."""
    chunks: list[Sequence[Append]] = []
    start = 0
    size = 0
    seen: set[str] = set()
    exclusive: set[str] = set()
    for index, append in enumerate(appends):
        special = append.expected is not None or ROLLUP in append.headers
        clash = append.subject in exclusive or (special and append.subject in seen)
        if index - start >= MOST_IN_BATCH or size + len(append.payload) > MOST_BYTES_IN_BATCH or clash:
            if index > start:
                chunks.append(appends[start:index])
            start, size = index, 0
            seen, exclusive = set(), set()
        seen.add(append.subject)
        if special:
            exclusive.add(append.subject)
        size += len(append.payload)
    chunks.append(appends[start:])
    return chunks
