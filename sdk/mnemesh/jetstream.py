"""The JetStream API calls that the mesh needs, as plain requests, and the shape of the log's stream.

nats-py's own client lacks `allow_atomic` and its watchers stall when a consumer is lost, so streams and buckets are
made here, followed by `follower.py`, and written by `log_writer.py`, `kv.py` and `objects.py`. Looks at `inbox`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from mnemesh import subjects
from mnemesh.clock import to_ms
from mnemesh.connection import Message
from mnemesh.errors import Conflict, Internal, MnemeshError, NotFound, Timeout, TooLarge, Unavailable
from mnemesh.inbox import Inbox

API = "$JS.API"
API_BUDGET_S = 5.0

NOT_FOUND = (10014, 10059, 10037, 10043)
"""consumer, stream, message, sequence not found (nats-server's errors.json)"""
WRONG_LAST_SEQUENCE = 10071
WRONG_LAST_SEQUENCE_CONSTANT = 10164
WRONG_LAST_ID = 10070
MOST_IN_GET = 500
"""Messages in one batched direct get; nats-server's own limit is 1,024."""
ALL = ">"
"""As a subject: every message. The server sends 24,000 a second, and 10,000 where it must compare subjects."""
UNREACHED = 2**31 - 1
"""A limit for a stream that is to have none: with one its files, and so its buffers, are of 4 MiB rather than 8."""
BATCH_HOLDS_DUPLICATE = 10201
NO_BATCH = (10176, 10210)
"""A batch whose beginning was lost with a connection, or came while there were too many open ones."""
FIRST_TRY_UNDER_WAY = 10158
"""Of the same id."""


class JetStreamError(Internal):
    """An error reply of JetStream; `err_code` is the number in nats-server's errors.json."""

    def __init__(self, message: str, err_code: int) -> None:
        super().__init__(message)
        self.err_code = err_code


class NoBatch(Unavailable):
    """The server has no such atomic batch open, and has stored nothing of it."""


class WrongSequence(Conflict):
    """The subject's last sequence is not the one that a compare-and-set expected."""


def check(reply: dict[str, Any]) -> dict[str, Any]:
    """A JetStream reply, or raise what its error stands for."""
    error = reply.get("error")
    if error is None:
        return reply
    number = error.get("err_code", 0)
    text = f"JetStream: {error.get('description', error)} ({number})"
    if number in (WRONG_LAST_SEQUENCE, WRONG_LAST_SEQUENCE_CONSTANT):
        raise WrongSequence(text)
    if number in NOT_FOUND:
        raise NotFound(text)
    if number in (10054, 10097):
        raise TooLarge(text)
    if number in NO_BATCH:
        raise NoBatch(text, retry_after_ms=200)
    if error.get("code") == 503 or number == FIRST_TRY_UNDER_WAY:
        raise Unavailable(text, retry_after_ms=200)
    raise JetStreamError(text, number)


async def api(inbox: Inbox, verb: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One API request, such as `STREAM.INFO.name`. Raises what `check` raises, and what `Inbox.request` does."""
    payload = json.dumps(body).encode() if body else b""
    message = await inbox.request(f"{API}.{verb}", payload, budget_s=API_BUDGET_S)
    return check(json.loads(message.data))


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a stream stands. `incarnation` tells a stream from another of the same name made later."""

    incarnation: str
    first_sequence: int
    last_sequence: int
    messages: int
    bytes: int


async def stream_state(inbox: Inbox, stream: str) -> StreamState:
    """The state of a stream, from its leader."""
    info = await api(inbox, f"STREAM.INFO.{stream}")
    state = info["state"]
    return StreamState(info["created"], state["first_seq"], state["last_seq"], state["messages"], state["bytes"])


class Stored(NamedTuple):
    """A message at its place in the stream. `recorded_at` is the stream's time in milliseconds since 1970.

    `following` is how many more the stream held when the server sent it.
    """

    sequence: int
    recorded_at: int
    message: Message
    following: int


async def last_of_each(inbox: Inbox, stream: str, filter_subject: str) -> list[Stored]:
    """The last message of every subject of a stream that matches."""
    return [await last_of(inbox, stream, subject) for subject in await counts_of(inbox, stream, filter_subject)]


async def last_of(inbox: Inbox, stream: str, subject: str) -> Stored:
    """The last message of a subject, which may have wildcards. Raises `NotFound`."""
    return await _get(inbox, stream, {"last_by_subj": subject})


async def message_at(inbox: Inbox, stream: str, sequence: int) -> Stored:
    """The message at a sequence. Raises `NotFound` where none is, or none is any more."""
    if sequence < 1:
        raise NotFound(f"{stream} begins at 1")  # which the server calls a bad request
    return await _get(inbox, stream, {"seq": sequence})


async def delete_message(inbox: Inbox, stream: str, sequence: int) -> None:
    """Take a message out of a stream and overwrite it, if it is there. Raises what `check` raises."""
    try:
        await api(inbox, f"STREAM.MSG.DELETE.{stream}", {"seq": sequence})
    except (NotFound, JetStreamError):  # the server has one number for all that may fail
        with contextlib.suppress(NotFound):
            await message_at(inbox, stream, sequence)
            raise


async def purge(inbox: Inbox, stream: str, subject: str) -> None:
    """Take all messages of a subject, which may have wildcards, out of a stream."""
    await api(inbox, f"STREAM.PURGE.{stream}", {"filter": subject})


async def history_of(inbox: Inbox, stream: str, subject: str, *, upto: int) -> list[Stored]:
    """All messages of a subject, which may have wildcards, up to a sequence, in their order. Raises `Timeout`."""
    found: list[Stored] = []
    while True:
        some = await next_of(inbox, stream, subject, after=found[-1].sequence if found else 0)
        known = [stored for stored in some if stored.sequence <= upto]
        found += known
        if len(known) < len(some) or not some or not some[-1].following:
            return found


async def counts_of(inbox: Inbox, stream: str, subject: str) -> dict[str, int]:
    """How many messages there are of each subject that this one, which may have wildcards, takes in."""
    counts: dict[str, int] = {}
    offset, total = 0, 1
    while offset < total:  # the server tells 100,000 subjects at a time
        told = await api(inbox, f"STREAM.INFO.{stream}", {"subjects_filter": subject, "offset": offset})
        some = told["state"].get("subjects") or {}
        counts |= some
        offset, total = offset + max(1, len(some)), told.get("total", 0)
    return counts


async def next_of(inbox: Inbox, stream: str, subject: str, *, after: int) -> list[Stored]:
    """The next messages of a subject, which may have wildcards, up to `MOST_IN_GET`; none if there are no more.

    By a batched direct get (ADR-31), so nothing is kept at the server. Raises `Timeout` if it does not send all of it.
    """
    wanted = json.dumps({"seq": after + 1, "batch": MOST_IN_GET, "next_by_subj": subject}).encode()
    *messages, end = await inbox.gather(
        f"{API}.DIRECT.GET.{stream}", wanted, most=MOST_IN_GET + 1, wait_s=API_BUDGET_S, is_last=_ends_a_get
    ) or [_NOTHING]
    if not _ends_a_get(end):
        raise Timeout(f"{stream} did not send all that it has of {subject} in {API_BUDGET_S} s")
    return [_got(message) for message in messages]


def _got(message: Message) -> Stored:
    headers = message.headers
    recorded_at = to_ms(datetime.fromisoformat(headers["Nats-Time-Stamp"]))
    stored = message.under(headers["Nats-Subject"])
    return Stored(int(headers["Nats-Sequence"]), recorded_at, stored, int(headers.get("Nats-Num-Pending", 0)))


def _ends_a_get(message: Message) -> bool:
    """`204 EOB` after the last of a batch, `404` where there is none."""
    return message.status in ("204", "404")


_NOTHING = Message("", "", b"")


async def _get(inbox: Inbox, stream: str, wanted: dict[str, Any]) -> Stored:
    held = (await api(inbox, f"STREAM.MSG.GET.{stream}", wanted))["message"]
    recorded_at = to_ms(datetime.fromisoformat(held["time"]))
    headers = base64.b64decode(held.get("hdrs", "")) or None
    message = Message(held["subject"], "", base64.b64decode(held.get("data", "")), headers)
    return Stored(held["seq"], recorded_at, message, 0)


SiteKind = Literal["hub", "device"]

MESSAGE_KEY = "mnemesh.message-id-key"


def log_config(site: str, *, kind: SiteKind = "hub", replicas: int = 1) -> dict[str, Any]:
    """How the log of a site is configured."""
    return {
        "name": subjects.log_stream(site),
        "subjects": [
            subjects.log_event("*", "*", "*", "*"),
            subjects.log_mark("*"),
            subjects.log_holding("*", "*", "*", "*"),
        ],
        "retention": "limits",
        "discard": "new",
        "storage": "file",
        "num_replicas": replicas,
        "duplicate_window": subjects.LOG_DUPLICATE_WINDOW_S[kind] * 1_000_000_000,
        "allow_atomic": True,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "deny_delete": False,
        "max_msgs_per_subject": UNREACHED if kind == "device" else -1,
    }


def bucket_config(bucket: str, *, replicas: int = 1) -> dict[str, Any]:
    """How a KV bucket is configured: as `nats kv add` would (ADR-8), with a history of one."""
    return {
        "name": f"KV_{bucket}",
        "subjects": [f"$KV.{bucket}.>"],
        "storage": "file",
        "num_replicas": replicas,
        "max_msgs_per_subject": 1,
        "discard": "new",
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "allow_direct": True,
    }


def objects_config(bucket: str, *, replicas: int = 1) -> dict[str, Any]:
    """How a bucket of the Object Store is configured: as `nats object add` would (ADR-20)."""
    return {
        "name": f"OBJ_{bucket}",
        "subjects": [f"$O.{bucket}.C.>", f"$O.{bucket}.M.>"],
        "storage": "file",
        "num_replicas": replicas,
        "discard": "new",
        "allow_rollup_hdrs": True,
        "allow_direct": True,
    }


async def ensure_log(inbox: Inbox, site: str, *, kind: SiteKind = "hub", replicas: int = 1) -> StreamState:
    """Make the log of a site, or bring an existing one up to `log_config`."""
    config = log_config(site, kind=kind, replicas=replicas)
    await _ensure(inbox, config | {"metadata": {MESSAGE_KEY: secrets.token_hex(16)}})
    return await stream_state(inbox, subjects.log_stream(site))


async def message_id_key(inbox: Inbox, site: str) -> bytes:
    """What ids of messages are made with, a secret of the log that `ensure_log` made. Raises what `api` does."""
    config = (await api(inbox, f"STREAM.INFO.{subjects.log_stream(site)}"))["config"]
    return bytes.fromhex(config["metadata"][MESSAGE_KEY])


async def ensure_bucket(inbox: Inbox, bucket: str, *, replicas: int = 1) -> None:
    """Make a KV bucket, or bring an existing one up to `bucket_config`."""
    await _ensure(inbox, bucket_config(bucket, replicas=replicas))


async def ensure_objects(inbox: Inbox, bucket: str, *, replicas: int = 1) -> None:
    """Make a bucket of the Object Store, or bring an existing one up to `objects_config`."""
    await _ensure(inbox, objects_config(bucket, replicas=replicas))


async def _ensure(inbox: Inbox, config: dict[str, Any]) -> None:
    """Make a stream, or bring it up to a configuration. Metadata that it has stays."""
    name = config["name"]
    try:
        held = (await api(inbox, f"STREAM.INFO.{name}"))["config"]
    except NotFound:
        await api(inbox, f"STREAM.CREATE.{name}", config)
    else:
        metadata = config.get("metadata", {}) | held.get("metadata", {})
        await api(inbox, f"STREAM.UPDATE.{name}", config | {"metadata": metadata})


def is_refused_batch(error: MnemeshError) -> bool:
    """Whether a batch as a whole was refused for something that one member did."""
    return isinstance(error, Conflict) or (
        isinstance(error, JetStreamError) and error.err_code == BATCH_HOLDS_DUPLICATE
    )
