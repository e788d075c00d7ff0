"""A TCP line that can be cut without a sign, for tests within their loop, for benchmarks as a process of its own.

python -m bench.cable PORT     prints the port of its near end; then does what lines on standard input say: `cut`,
                               `heal`; says `done` to each; ends when its standard input closes
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

from mnemesh.host import run as run_process


class Cable:
    """A TCP line to `port` that can be cut: nothing passes then, and neither end is told.

    `tap` gets a copy of all that the near end sends.
    """

    def __init__(self, port: int, *, tap: bytearray | None = None) -> None:
        self._port = port
        self._tap = tap
        self._whole = asyncio.Event()
        self._whole.set()
        self._pipes: set[asyncio.Task[None]] = set()
        self._ends: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def laid(self) -> AsyncIterator[int]:
        """The port of its near end, within the block."""
        server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            self.cut()
            self.drop()

    def cut(self) -> None:
        self._whole.clear()

    def heal(self) -> None:
        """Connections of before are gone by now at one end or both: what was on its way in them does not come."""
        self.drop()
        self._whole.set()

    def drop(self) -> None:
        """Close every connection."""
        for pipe in self._pipes:
            pipe.cancel()
        for end in self._ends:
            end.close()
        self._pipes.clear()
        self._ends.clear()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.add(writer)
        await self._whole.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.close()
            return
        self._ends.add(far_writer)
        for source, sink, tap in ((reader, far_writer, self._tap), (far_reader, writer, None)):
            self._pipes.add(asyncio.ensure_future(self._carry(source, sink, tap)))

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, tap: bytearray | None) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                await self._whole.wait()
                if tap is not None:
                    tap += data
                sink.write(data)
                await sink.drain()
        sink.close()


class CableProcess:
    """A `Cable` that passes its bytes in a process of its own, so that they cost the one that measures nothing."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._process: asyncio.subprocess.Process

    @contextlib.asynccontextmanager
    async def laid(self) -> AsyncIterator[int]:
        """The port of its near end, within the block."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.cable", str(self._port)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            yield int(await self._said())
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def cut(self) -> None:
        await self._tell("cut")

    async def heal(self) -> None:
        await self._tell("heal")

    async def _tell(self, order: str) -> None:
        assert self._process.stdin is not None  # asked for above
        self._process.stdin.write(f"{order}\n".encode())
        await self._said()

    async def _said(self) -> bytes:
        assert self._process.stdout is not None  # asked for above
        return await self._process.stdout.readline()


async def _obey(cable: Cable) -> int:
    orders = {b"cut": cable.cut, b"heal": cable.heal}
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with cable.laid() as port:
        print(port, flush=True)
        while order := await reader.readline():
            orders[order.strip()]()
            print("done", flush=True)
    return 0


if __name__ == "__main__":
    line = Cable(int(sys.argv[1]))
    sys.exit(run_process(lambda stop: _obey(line)))
