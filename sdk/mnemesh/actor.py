"""The actor: a bounded, supervised, observable server of operations of the contract.

    class Greeter(Actor):
        role = "gateway"

        @handles(subjects.SET_CONTEXT)
        async def set_context(self, request: SetContext, call: Call) -> Written: ...

A subclass declares one handler for each operation that the contract says its role owns; a missing or foreign one is
an error when it starts. Each operation has its own mailbox. A request lives like this:

    callback: reply subject private?  →  mailbox (full: `busy`)
    task:     budget left?  →  decode  →  guard  →  handler  →  reply

`drain` loses nothing: unsubscribe, finish the mailboxes, flush the replies. The background work of an actor
(`background`) is supervised; it ends after the drain, and only then `close` gives back what both used. Discovery
(ADR-32) is `discovery.py`, the process around actors `host.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import nats.nuid
from nats.aio.subscription import Subscription

from mnemesh import subjects, wire
from mnemesh.asker import Asker
from mnemesh.call import Call, Caller, budget_s, current, error_body, error_headers
from mnemesh.connection import Link, Message
from mnemesh.contract import AnyOperation, Role, reply_is_private
from mnemesh.deadline import Deadline
from mnemesh.errors import BadRequest, Busy, Denied, Internal, MnemeshError, Timeout, TooLarge
from mnemesh.guard import AllowAll, Guard
from mnemesh.mailbox import Mailbox
from mnemesh.stats import Gauge, OperationStats
from mnemesh.supervision import Supervisor

logger = logging.getLogger("mnemesh.actor")

Handler = Callable[[Any, Call], Awaitable[Any]]
F = TypeVar("F", bound=Callable[..., Any])

BUSY_RETRY_MS = 50


def handles(operation: AnyOperation) -> Callable[[F], F]:
    """Mark a method as the handler of an operation."""

    def mark(method: F) -> F:
        method.__operation__ = operation  # type: ignore[attr-defined]  # read back by Actor.handlers
        return method

    return mark


class _Request(NamedTuple):
    """A message as it waits in a mailbox: when it came and until when it may be worked on (loop time)."""

    message: Message
    tokens: dict[str, str]
    arrived: float
    deadline: float


class Actor:
    """Base of everything that serves operations. Start it with `start`, end it with `drain` and `close`."""

    role: ClassVar[Role]

    def __init__(self, link: Link, *, guard: Guard | None = None) -> None:
        self.link = link
        self.guard: Guard = guard or AllowAll()
        self.asker = Asker(link)
        self.instance = nats.nuid.NUID().next().decode()
        self.stats: dict[str, OperationStats] = {}
        self._mailboxes: dict[str, Mailbox[_Request]] = {}
        self._subscriptions: list[Subscription] = []
        self._prepared = False

    # ── what a subclass says about itself ───────────────────────────────────────────────────────────────────

    def bindings(self, operation: AnyOperation) -> Iterable[Mapping[str, str]]:
        """The tokens that this actor fills in where it subscribes; one subscription for each map."""
        return ({},)

    def queue(self, operation: AnyOperation) -> str:
        """The queue group that shares the requests: all replicas of the actor."""
        return self.role

    def metadata(self) -> dict[str, str]:
        """What discovery tells about this actor beyond the contract's hash."""
        return {}

    def gauges(self) -> list[Gauge]:
        """Values for the metrics page."""
        return []

    def background(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """Work that runs beside the requests, by name. It is restarted when it fails."""
        return {}

    async def prepare(self) -> None:
        """Take what serving needs. The background work starts after."""

    async def ready(self) -> None:
        """Wait for what the background work must have reached before the first request."""

    async def release(self) -> None:
        """Give back what `prepare` took, after the last request and the background work."""

    def failed(self, error: BaseException) -> None:
        """A handler or background work raised what it should not. Raise `Escalated` where only a new start helps."""

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def handlers(cls) -> dict[str, tuple[AnyOperation, str]]:
        """Each handled operation and the name of its method. Raises if they are not what the contract demands."""
        found = {
            operation.name: (operation, name)
            for name in dir(cls)
            if (operation := getattr(getattr(cls, name), "__operation__", None)) is not None
        }
        owned = {name for name, operation in subjects.OPERATIONS.items() if operation.owner == cls.role}
        if missing := owned - found.keys():
            raise TypeError(f"{cls.__name__} must handle {', '.join(sorted(missing))}: its role owns them")
        if foreign := found.keys() - owned:
            raise TypeError(f"{cls.__name__} handles {', '.join(sorted(foreign))}, which its role does not own")
        return found

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Prepare, subscribe, and serve in tasks of `tasks`, which also runs the supervised background work."""
        handlers = self.handlers()
        await self.asker.open()
        self._prepared = True
        await self.prepare()
        works: dict[str, Callable[[], Awaitable[None]]] = {
            "guard": partial(self.guard.follow, self.link, self.asker.inbox),
            **self.background(),
        }
        for name, work in works.items():
            tasks.create_task(Supervisor(f"{self.role}.{name}", work, on_failure=self.failed).run(), name=name)
        await self.guard.ready()
        await self.ready()
        for operation, method in handlers.values():
            stats = self.stats[operation.name] = OperationStats()
            server = _Server(self, operation, getattr(self, method), stats, tasks)
            self._mailboxes[operation.name] = server.mailbox
            for tokens in self.bindings(operation):
                subscription = await self.link.subscribe(
                    operation.pattern(**tokens), server.on_message, queue=self.queue(operation)
                )
                self._subscriptions.append(subscription)
        await self.link.confirm()

    async def drain(self) -> None:
        """Stop taking requests, finish those taken, send their replies. Works also while the connection is down."""
        await self.link.drain(self._subscriptions)
        for mailbox in self._mailboxes.values():
            await mailbox.finished()
        if self.link.is_connected:
            await self.link.flush()

    async def close(self) -> None:
        """Give everything back, once all tasks of the actor have ended."""
        try:
            if self._prepared:
                await self.release()
        finally:
            await self.link.close()


class _Server:
    """Serves one operation of one actor."""

    def __init__(
        self,
        actor: Actor,
        operation: AnyOperation,
        handler: Handler,
        stats: OperationStats,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._actor = actor
        self._link = actor.link
        self._operation = operation
        self._handler = handler
        self._stats = stats
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._positions = operation.positions
        self.mailbox: Mailbox[_Request] = Mailbox(
            self._serve,
            capacity=operation.mailbox,
            concurrency=operation.concurrency,
            share=operation.per_site,
            tasks=tasks,
        )

    def on_message(self, message: Message) -> None:
        """Take a message into the mailbox, or refuse it."""
        now = self._loop.time()
        tokens = self._tokens(message)
        if not reply_is_private(self._operation, tokens, message.reply):
            logger.warning("a request to %s wanted its reply on %s", self._operation.name, message.reply)
            self._stats.record(Denied.code, 0.0)
            return
        try:
            deadline = now + budget_s(self._operation, message.headers)
        except BadRequest as error:
            self._tasks.create_task(self._refuse(message, error, now))
            return
        if not self.mailbox.offer(_Request(message, tokens, now, deadline), tokens.get("site", "")):
            full = Busy(f"the mailbox of {self._operation.name} is full", retry_after_ms=BUSY_RETRY_MS)
            self._tasks.create_task(self._refuse(message, full, now))
        self._stats.waiting = self.mailbox.waiting

    async def _serve(self, request: _Request) -> None:
        self._stats.waiting = self.mailbox.waiting
        self._stats.in_flight += 1
        try:
            await self._answer(request)
        finally:
            self._stats.in_flight -= 1

    async def _answer(self, request: _Request) -> None:
        message = request.message
        code = "ok"
        headers: dict[str, str] | None = None
        as_json = wire.is_json(message.data)
        bug: BaseException | None = None
        try:
            reply: object = await self._handle(request)
            payload = wire.encode(reply, as_json=as_json)
            self._link.check_size(payload, None)
        except MnemeshError as error:
            code, headers, payload = _error_reply(error, as_json)
            self._stats.last_error = f"{code}: {error.message}"
        except (Exception, asyncio.CancelledError) as error:  # a bug becomes `internal`; the log has it all
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise
            bug = error
            logger.exception("%s failed", self._operation.name)
            code, headers, payload = _error_reply(
                Internal(f"{self._operation.name} failed; see the log of the {self._actor.role}"), as_json
            )
            self._stats.last_error = f"{code}: {type(error).__name__}"
        await self._reply(message, payload, headers)
        self._stats.record(code, self._loop.time() - request.arrived)
        if bug is not None:
            self._actor.failed(bug)

    async def _handle(self, request: _Request) -> object:
        operation = self._operation
        message = request.message
        if request.deadline <= self._loop.time():
            raise Timeout(f"the budget was spent before {operation.name} began")
        if len(message.data) > operation.max_bytes:
            raise TooLarge(f"{operation.name} takes {operation.max_bytes} bytes; this request has {len(message.data)}")
        tokens = request.tokens
        caller = Caller(tokens.get("tenant", ""), tokens.get("agent", ""))
        call = Call(operation, caller, request.deadline, tokens, message.headers)
        decoded = wire.decode_as(message.data, operation.request)
        self._actor.guard.check(call, decoded)
        current.set(call)
        try:
            with Deadline(request.deadline):
                return await self._handler(decoded, call)
        except TimeoutError as error:
            if isinstance(error, MnemeshError):
                raise
            raise Timeout(f"{operation.name} did not finish within its budget") from error

    def _tokens(self, message: Message) -> dict[str, str]:
        parts = message.subject.split(".")
        return {name: parts[index] for name, index in self._positions.items()}

    async def _refuse(self, message: Message, error: MnemeshError, arrived: float) -> None:
        code, headers, payload = _error_reply(error, wire.is_json(message.data))
        await self._reply(message, payload, headers)
        self._stats.last_error = f"{code}: {error.message}"
        self._stats.record(code, self._loop.time() - arrived)

    async def _reply(self, message: Message, payload: bytes, headers: dict[str, str] | None) -> None:
        if not message.reply:
            return
        try:
            await self._link.publish(message.reply, payload, headers=headers)
        except MnemeshError as error:
            logger.warning("a reply to %s could not be sent: %s", self._operation.name, error.message)


def _error_reply(error: MnemeshError, as_json: bool) -> tuple[str, dict[str, str], bytes]:
    return error.code, error_headers(error), wire.encode(error_body(error), as_json=as_json)


def _is_cancelled() -> bool:
    """Whether a `CancelledError` is meant for this task, rather than leaked from something that it awaited."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
