"""The servers that stores are tested and measured against: real ones, on free ports, stopped by process id.

    python -m bench.store_servers    installs what is missing, into caches that the next run finds

What cannot be had is said: the tests that need it are skipped with the reason, and fail instead where
MNEMESH_NEEDS_ALL_SERVERS is set, as CI does. Versions are those of `constraints.txt`, of Debian, and those below.
"""

from __future__ import annotations

import contextlib
import importlib.util
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import neo4j
import redis
from neo4j.exceptions import AuthError

from cli.server import free_port

NEO4J_VERSION = "5.26.16"
MILVUS_VERSION = "2.3.5"  # the newest whole server that is packed as a wheel
START_S = 60.0

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mnemesh"
NEO4J_JARS = CACHE / f"neo4j-{NEO4J_VERSION}"
MILVUS = CACHE / f"milvus-{MILVUS_VERSION}"
POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>mnemesh</groupId><artifactId>neo4j-for-tests</artifactId><version>1</version>
  <dependencies>
    <dependency><groupId>org.neo4j.app</groupId><artifactId>neo4j-server</artifactId><version>{NEO4J_VERSION}</version></dependency>
    <dependency><groupId>org.neo4j</groupId><artifactId>neo4j</artifactId><version>{NEO4J_VERSION}</version></dependency>
  </dependencies>
</project>
"""


class NotToBeHad(Exception):
    """A server that this machine cannot run, and why."""


# ── installing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def install() -> None:
    """Get what is missing, as far as this machine can; says what it cannot."""
    for what, get in (("Redis", _install_redis), ("Neo4j", _install_neo4j), ("Milvus", _install_milvus)):
        try:
            get()
        except (OSError, subprocess.SubprocessError) as error:
            print(f"{what} is not to be had, and its tests will not run: {error}", file=sys.stderr)


def _install_redis() -> None:
    if shutil.which("redis-server") is None:
        _run("apt-get", "update")
        _run("apt-get", "install", "--yes", "--no-install-recommends", "redis-server", "redis-tools")


def _install_neo4j() -> None:
    """214 jars, whole or not at all."""
    if NEO4J_JARS.exists():
        return
    making = CACHE / f"making-neo4j-{os.getpid()}"
    making.mkdir(parents=True)
    try:
        (making / "pom.xml").write_text(POM)
        copy = ("dependency:copy-dependencies", "-DincludeScope=runtime", "-DoutputDirectory=lib")
        _run("mvn", "--quiet", "--batch-mode", *copy, cwd=making)
        (making / "lib").rename(NEO4J_JARS)
    finally:
        shutil.rmtree(making)


def _install_milvus() -> None:
    """The wheel `milvus` holds a server, packed; only its binary wheel is wanted, and none of what it installs."""
    if MILVUS.exists():
        return
    making = CACHE / f"making-milvus-{os.getpid()}"
    try:
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        _run(*pip, "--no-deps", f"--target={making}", f"milvus=={MILVUS_VERSION}")
        programs = making / "bin"
        programs.mkdir(exist_ok=True)
        for packed in (making / "milvus" / "data" / "bin").glob("*.lzma"):
            program = programs / packed.stem
            program.write_bytes(lzma.decompress(packed.read_bytes()))
            program.chmod(0o755)
            packed.unlink()
        making.rename(MILVUS)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _run(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(command, check=True, cwd=cwd, stdout=subprocess.DEVNULL, timeout=600)


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Server:
    """A server process, which a test may stop, pause and start again."""

    def __init__(
        self, command: list[str], folder: Path, answers: Callable[[], object], environment: Mapping[str, str] = {}
    ) -> None:
        self._command = command
        self._environment = {**os.environ, **environment}
        self._folder = folder
        self._answers = answers
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, stdout=log, stderr=log, env=self._environment
            )
        deadline = time.monotonic() + START_S
        while True:
            try:
                self._answers()
            except Exception:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def send(self, signum: signal.Signals) -> None:
        assert self._process is not None, "it was started"
        self._process.send_signal(signum)

    def kill(self) -> None:
        """Without notice, as a machine dies."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class RedisServer(Server):
    """One Redis, with what it wrote kept in its folder."""

    def __init__(self, folder: Path, *flags: str) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise NotToBeHad("redis-server is not installed (apt-get install redis-server)")
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        kept = ("--appendonly", "yes", "--appendfsync", "everysec", "--save", "")
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), *kept, *flags]
        super().__init__(command, folder, self._ping)

    def _ping(self) -> None:
        with redis.Redis(port=self.port, socket_timeout=1) as client:
            try:
                client.ping()
            except redis.AuthenticationError:
                return


class Neo4jServer(Server):
    """One Neo4j community server, of which the first start sets the password."""

    PASSWORD = "mnemesh-tests"
    CONF = """server.bolt.listen_address=127.0.0.1:{port}
server.bolt.advertised_address=127.0.0.1:{port}
server.http.enabled=false
server.https.enabled=false
server.memory.heap.initial_size=512m
server.memory.heap.max_size=512m
server.memory.pagecache.size=64m
dbms.usage_report.enabled=false
"""
    OPENED = ("java.nio", "java.io", "sun.nio.ch", "java.util.concurrent")
    """Packages of java.base that Neo4j's own launcher opens to it."""

    def __init__(self, folder: Path) -> None:
        java = shutil.which("java")
        if java is None or not NEO4J_JARS.exists():
            raise NotToBeHad(f"Neo4j is not installed: it needs OpenJDK 17 or later, and its jars in {NEO4J_JARS}")
        (folder / "conf").mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"bolt://neo4j:{self.PASSWORD}@127.0.0.1:{self.port}"
        (folder / "conf" / "neo4j.conf").write_text(self.CONF.format(port=self.port))
        opened = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in self.OPENED]
        command = [java, "-Xmx512m", *opened, "-cp", f"{NEO4J_JARS}/*", "org.neo4j.server.CommunityEntryPoint"]
        super().__init__([*command, f"--home-dir={folder}", f"--config-dir={folder / 'conf'}"], folder, self._ask)

    def _ask(self) -> None:
        try:
            self._as(self.PASSWORD, "neo4j", "RETURN 1")
        except AuthError:
            first = f"ALTER CURRENT USER SET PASSWORD FROM 'neo4j' TO '{self.PASSWORD}'"
            self._as("neo4j", "system", first)

    def _as(self, password: str, database: str, cypher: str) -> None:
        with (
            neo4j.GraphDatabase.driver(f"bolt://127.0.0.1:{self.port}", auth=("neo4j", password)) as driver,
            driver.session(database=database) as session,
        ):
            session.run(cypher).consume()


class MilvusServer(Server):
    """One Milvus, standalone: what its parts need of etcd and an object store is in the process and its folder."""

    def __init__(self, folder: Path, *, guarded: bool = False) -> None:
        """One that is `guarded` lets `root` in, with the password `Milvus`."""
        if not MILVUS.exists():
            raise NotToBeHad(f"Milvus is not installed in {MILVUS}")
        spec = importlib.util.spec_from_file_location("milvus", MILVUS / "milvus" / "__init__.py")
        assert spec is not None, "it is a file"
        assert spec.loader is not None, "it is Python"
        package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
        config = package.MilvusServerConfig(data_dir=str(folder))
        config.resolve()
        self.port = int(config.get("proxy_port"))
        self.url = f"milvus://127.0.0.1:{self.port}"
        self._have_etcd_on_free_ports(folder)
        if guarded:
            settings = folder / "configs" / "milvus.yaml"
            settings.write_text(
                settings.read_text().replace("authorizationEnabled: false", "authorizationEnabled: true")
            )
        self._health = f"http://127.0.0.1:{free_port()}/healthz"
        environment = {
            "DEPLOY_MODE": "STANDALONE",
            "METRICS_PORT": self._health.split(":")[2].split("/")[0],
            "MILVUS_RUN_DIR": str(folder / "run"),
            "LD_LIBRARY_PATH": str(MILVUS / "bin"),
        }
        super().__init__([str(MILVUS / "bin" / "milvus"), "run", "standalone"], folder, self._ask, environment)

    def _have_etcd_on_free_ports(self, folder: Path) -> None:
        """The etcd within it would listen on the same port in every Milvus of a machine."""
        clients, peers = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        etcd, milvus = folder / "configs" / "etcd.yaml", folder / "configs" / "milvus.yaml"
        etcd.write_text(
            f"listen-client-urls: {clients}\nadvertise-client-urls: {clients}\n"
            f"listen-peer-urls: {peers}\ninitial-advertise-peer-urls: {peers}\ninitial-cluster: default={peers}\n"
        )
        text = milvus.read_text().replace("\netcd:\n", f"\netcd:\n  config:\n    path: {etcd}\n")
        milvus.write_text(re.sub(r"(\netcd:.*?endpoints:) \S+", rf"\1 {clients.partition('//')[2]}", text, flags=re.S))

    def _ask(self) -> None:
        with urllib.request.urlopen(self._health, timeout=5) as answer:
            if b"OK" not in answer.read():
                raise ConnectionError("Milvus is starting")


@contextlib.contextmanager
def running(server: Server) -> Iterator[None]:
    """Have it run while the block does. One that does not answer in time is ended, too."""
    try:
        server.start()
        yield
    finally:
        server.kill()


@contextlib.contextmanager
def redis_cluster(folder: Path) -> Iterator[list[RedisServer]]:
    """Three of them that share the slots. The URL of any leads to all."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for number in range(3):
            ports = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
            nodes.append(RedisServer(folder / str(number), *ports))
            stack.enter_context(running(nodes[-1]))
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        _run("redis-cli", "--cluster", "create", *addresses, "--cluster-yes")
        deadline = time.monotonic() + START_S
        for node in nodes:
            with redis.Redis(port=node.port) as client:
                while client.cluster("info")["cluster_state"] != "ok":
                    if time.monotonic() > deadline:
                        raise TimeoutError("the nodes of the cluster do not find together")
                    time.sleep(0.05)
        yield nodes


if __name__ == "__main__":
    install()
