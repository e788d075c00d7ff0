"""The bare references, each a process of its own like the services that it stands beside.

    python -m bench.bare echo URL                 a raw nats-py responder: on `bare.echo` with what was sent, on
                                                  `bare.reply.BYTES` with so many bytes, whatever was sent
    python -m bench.bare actor URL                our runtime with a handler that does nothing
    python -m bench.bare relay URL                from a stream of a leaf to one of the server whose leaf it is
    python -m bench.bare faiss URL NAME FILE      a raw nats-py responder on `bare.faiss.NAME` over one FAISS index

They talk over a nats-server without users, permissions or mappings: same machine, same program. They run as our
services do (`mnemesh.host.run`: uvloop, the same garbage collection), and end when their standard input closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import faiss
import msgpack
import nats
import numpy as np
from nats.aio.msg import Msg

from cli.server import find_nats_server, free_port
from mnemesh import messages, subjects
from mnemesh.actor import Actor, handles
from mnemesh.call import Call
from mnemesh.connection import Link, LinkOptions
from mnemesh.host import hosted
from mnemesh.host import run as run_process

READY = b"ready"
START_S = 60.0


class Nothing(Actor):
    """Handlers that do nothing: what is left is the runtime."""

    role = "gateway"

    async def _written(self, request: messages.SetContext, call: Call) -> messages.Written:
        return messages.Written(entity_id=request.entity_id, version=1, token={"hub": 1})

    set_context = handles(subjects.SET_CONTEXT)(_written)

    @handles(subjects.UPSERT_EMBEDDING)
    async def upsert_embedding(self, request: messages.UpsertEmbedding, call: Call) -> messages.Written:
        raise NotImplementedError

    @handles(subjects.FORGET)
    async def forget(self, request: messages.Forget, call: Call) -> messages.Written:
        raise NotImplementedError

    @handles(subjects.INGEST)
    async def ingest(self, request: messages.Ingest, call: Call) -> messages.Ingested:
        raise NotImplementedError


@contextlib.asynccontextmanager
async def echo(url: str) -> AsyncIterator[None]:
    """Answer with the payload, or with as many bytes as the subject says."""
    client = await nats.connect(url)
    replies: dict[str, bytes] = {}

    async def respond(message: Msg) -> None:
        await message.respond(message.data)

    async def reply(message: Msg) -> None:
        payload = replies.get(message.subject)
        if payload is None:
            payload = replies[message.subject] = bytes(int(message.subject.rsplit(".", 1)[1]))
        await message.respond(payload)

    await client.subscribe("bare.echo", cb=respond)
    await client.subscribe("bare.reply.*", cb=reply)
    await client.flush()
    yield


@contextlib.asynccontextmanager
async def actor(url: str) -> AsyncIterator[None]:
    async with hosted(Nothing(await Link.open(LinkOptions(url=url, inbox_prefix=subjects.gateway_inbox())))):
        yield


@contextlib.asynccontextmanager
async def search(url: str, name: str, file: Path) -> AsyncIterator[None]:
    """One query a message: float32 bytes in, scores and rows out."""
    vectors = np.load(file)
    index = scalar_index(vectors)
    faiss.omp_set_num_threads(1)
    client = await nats.connect(url)

    async def respond(message: Msg) -> None:
        scores, rows = index.search(np.frombuffer(message.data, np.float32)[None], 10)
        await message.respond(msgpack.packb([scores[0].tolist(), rows[0].tolist()]))

    await client.subscribe(f"bare.faiss.{name}", cb=respond)
    await client.flush()
    yield


@contextlib.asynccontextmanager
async def relay(url: str) -> AsyncIterator[None]:
    client = await nats.connect(url)
    stream = client.jetstream()

    async def pass_on(message: Msg) -> None:
        await stream.publish("hub.event", message.data)

    await stream.subscribe("device.event", stream="DEVICE", ordered_consumer=True, cb=pass_on)
    yield


def scalar_index(vectors: np.ndarray) -> faiss.IndexScalarQuantizer:
    """The index that a flat space keeps: float16 codes, inner product."""
    index = faiss.IndexScalarQuantizer(vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:1])
    index.add(vectors)
    return index


@contextlib.asynccontextmanager
async def leaf() -> AsyncIterator[tuple[str, str]]:
    """Two such servers, the first a leaf of the second, each with a stream, and the relay between them."""
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        urls = []
        for name, nodes in (
            ("hub", f"port: {port}"),
            ("device", f'remotes: [{{ url: "nats://127.0.0.1:{port}" }}]'),
        ):
            url = await stack.enter_async_context(server(name, f"leafnodes {{ {nodes} }}"))
            async with await nats.connect(url) as client:
                await client.jetstream().add_stream(name=name.upper(), subjects=[f"{name}.event"])
            urls.append(url)
        hub, device = urls
        await stack.enter_async_context(running("relay", device))
        yield device, hub


@contextlib.asynccontextmanager
async def server(domain: str = "bare", more: str = "") -> AsyncIterator[str]:
    """A nats-server with JetStream synced at every write, and nothing but what `more` says; yields its URL."""
    with tempfile.TemporaryDirectory(prefix="mnemesh-bare-") as folder:
        port = free_port()
        config = Path(folder) / "bare.conf"
        config.write_text(
            f"host: 127.0.0.1\nport: {port}\nserver_name: {domain}\n{more}\n"
            f'jetstream {{ store_dir: "{folder}", sync_interval: always, domain: {domain} }}\n'
        )
        process = await asyncio.create_subprocess_exec(find_nats_server(), "-c", config, stderr=subprocess.DEVNULL)
        try:
            url = f"nats://127.0.0.1:{port}"
            async with asyncio.timeout(START_S):
                while not await _answers(port):  # noqa: ASYNC110  # another process: its start is no event of ours
                    await asyncio.sleep(0.02)
            yield url
        finally:
            process.terminate()
            await process.wait()


async def _answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


@contextlib.asynccontextmanager
async def running(*arguments: str) -> AsyncIterator[None]:
    """One of this file's processes, from when it says that it is ready."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.bare", *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None  # asked for above
        async with asyncio.timeout(START_S):
            if (await process.stdout.readline()).strip() != READY:
                raise RuntimeError(f"bench.bare {arguments} did not start")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def main(arguments: list[str]) -> int:
    match arguments:
        case ["echo", url]:
            serve = echo(url)
        case ["actor", url]:
            serve = actor(url)
        case ["relay", url]:
            serve = relay(url)
        case ["faiss", url, name, file]:
            serve = search(url, name, Path(file))
        case _:
            sys.exit(__doc__)

    class Watch(asyncio.Protocol):
        def connection_lost(self, error: Exception | None) -> None:
            ended.set()

    ended = asyncio.Event()

    async def until_stdin_closes(stop: asyncio.Event) -> int:
        async with serve:
            print("ready", flush=True)
            await asyncio.get_running_loop().connect_read_pipe(Watch, sys.stdin)
            await ended.wait()
        return 0

    return run_process(until_stdin_closes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
