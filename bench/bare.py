"""The bare references, each a process of its own like the services that it stands beside.

    python -m bench.bare echo URL                 a raw nats-py responder on `bare.echo`
    python -m bench.bare actor URL                our runtime with a handler that does nothing
    python -m bench.bare faiss URL NAME FILE      a raw nats-py responder on `bare.faiss.NAME` over one FAISS index

`Bare` starts them over a nats-server without users, permissions or mappings. Same machine, same server program.
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
import uvloop
from nats.aio.msg import Msg

from cli.server import find_nats_server, free_port
from mnemesh import messages, subjects
from mnemesh.actor import Actor, handles
from mnemesh.call import Call
from mnemesh.connection import Link, LinkOptions
from mnemesh.host import hosted

READY = b"ready"


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


async def echo(url: str) -> None:
    """Answer with the payload."""
    client = await nats.connect(url)

    async def respond(message: Msg) -> None:
        await message.respond(message.data)

    await client.subscribe("bare.echo", cb=respond)
    await client.flush()
    print("ready", flush=True)
    await asyncio.Event().wait()


async def actor(url: str) -> None:
    async with hosted(Nothing(await Link.open(LinkOptions(url=url, inbox_prefix=subjects.gateway_inbox())))):
        print("ready", flush=True)
        await asyncio.Event().wait()


async def search(url: str, name: str, file: Path) -> None:
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
    print("ready", flush=True)
    await asyncio.Event().wait()


def scalar_index(vectors: np.ndarray) -> faiss.IndexScalarQuantizer:
    """The index that a flat space keeps: float16 codes, inner product."""
    index = faiss.IndexScalarQuantizer(vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:1])
    index.add(vectors)
    return index


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[str]:
    """A nats-server with JetStream synced at every write, and nothing else; yields its URL."""
    with tempfile.TemporaryDirectory(prefix="mnemesh-bare-") as folder:
        port = free_port()
        config = Path(folder) / "bare.conf"
        config.write_text(
            f'host: 127.0.0.1\nport: {port}\njetstream {{ store_dir: "{folder}", sync_interval: always }}\n'
        )
        process = await asyncio.create_subprocess_exec(find_nats_server(), "-c", config, stderr=subprocess.DEVNULL)
        try:
            url = f"nats://127.0.0.1:{port}"
            for _ in range(100):
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.05)
            yield url
        finally:
            process.terminate()
            await process.wait()


@contextlib.asynccontextmanager
async def running(*arguments: str) -> AsyncIterator[None]:
    """One of this file's processes, from when it says that it is ready."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.bare", *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None  # asked for above
        if (await process.stdout.readline()).strip() != READY:
            raise RuntimeError(f"bench.bare {arguments} did not start")
        yield
    finally:
        process.kill()
        await process.wait()


def main(arguments: list[str]) -> None:
    match arguments:
        case ["echo", url]:
            uvloop.run(echo(url))
        case ["actor", url]:
            uvloop.run(actor(url))
        case ["faiss", url, name, file]:
            uvloop.run(search(url, name, Path(file)))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
