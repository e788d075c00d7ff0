"""`mnemesh up` as people get it wrong: a folder in use, ports taken, names that cannot be, Ctrl-C too early."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from pathlib import Path

import pytest
from conftest import server_options

from cli.main import main
from cli.mesh import Mesh, MeshOptions
from cli.server import DataInUse, NatsServer, free_port
from mnemesh.errors import Unavailable


async def test_a_second_mesh_on_a_folder_in_use_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with NatsServer(server_options(tmp_path), agents=[("acme", "alice")]) as server:
        held = server.credentials.load("acme.alice").path.read_text()
        with pytest.raises(DataInUse):
            async with Mesh(MeshOptions(server=server_options(tmp_path), agents=[("acme", "alice")])):
                pass
        assert server.credentials.load("acme.alice").path.read_text() == held


async def test_a_service_that_cannot_start_is_named_with_its_reason(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        options = MeshOptions(server=server_options(tmp_path), metrics_port=taken.getsockname()[1])
        with pytest.raises(Unavailable, match=r"does not start: cannot serve metrics on .*: Address already in use"):
            async with Mesh(options):
                pass


async def test_ctrl_c_ends_a_mesh_that_is_still_coming_up(tmp_path: Path) -> None:
    options = server_options(tmp_path)
    flags = ["--data", str(tmp_path), "--port", str(options.port), "--monitoring-port", str(options.monitoring_port)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "up", *flags, "--metrics-port", "0"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    while not (tmp_path / "nats-server.pid").exists():  # noqa: ASYNC110  # another process makes it
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = await process.communicate()
    assert process.returncode == 0
    assert b"mnemesh is up" not in said
    assert said.endswith(b"stopped; all that was acknowledged is in the data folder\n")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "-1"], "must be 1 to 65535"),
        (["--port", "70000"], "must be 1 to 65535"),
        (["--monitoring-port", "0"], "must be 1 to 65535"),
        (["--metrics-port", "65533"], "--metrics-port must be 0"),
        (["--site", "a.b"], "site 'a.b' must be"),
        (["--shards", "0"], "--shards must be 1 to 64"),
        (["--agent", "nodot"], "expected TENANT.AGENT"),
        (["--data", "/proc/none"], "/proc/none: No such file or directory"),
    ],
)
def test_a_flag_that_cannot_be_is_named(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", *flags]) == 1
    assert says in capsys.readouterr().err


def test_a_credentials_file_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, says in ((tmp_path / "none.json", "cannot read"), (tmp_path / "text.json", "not a credentials file")):
        (tmp_path / "text.json").write_text("no json")
        assert main(["run", "gateway", "--credentials", str(file)]) == 1
        assert says in capsys.readouterr().err
