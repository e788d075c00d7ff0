"""`examples/edge`: what its units, its Compose file and its README type is what the command understands."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli import edge, mesh, up
from cli.interest import read_interest
from cli.main import parser_for
from cli.policy import read_policy
from cli.server import NatsServer
from mnemesh import host
from services.sovereignty_text import parse

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "edge"
PROGRAM = "/opt/mnemesh/bin/mnemesh"
SERVER_STOP_S = NatsServer.stop.__kwdefaults__["timeout_s"]
DRAIN_S = {"hub": mesh.DRAIN_S + SERVER_STOP_S, "edge": host.DRAIN_S + SERVER_STOP_S}
"""What a service manager must wait before it kills."""


def understood(arguments: Sequence[str]) -> None:
    """Fail with what the command itself says if it does not take these arguments."""
    flags = parser_for(arguments).parse_args(arguments)
    if arguments[:1] == ["up"]:
        up.options(flags)
    if arguments[:2] == ["edge", "up"]:
        edge._options(flags)


def unit(name: str) -> dict[str, str]:
    """The settings of a unit; none of those looked at is there twice."""
    lines = (EXAMPLE / f"mnemesh-{name}.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))


def arguments_of(name: str) -> list[str]:
    """What a unit calls the command with, as systemd reads its environment file and its command line."""
    settings = unit(name)
    lines = (EXAMPLE / Path(settings["EnvironmentFile"]).name).read_text().splitlines()
    environment = dict(shlex.split(line)[0].split("=", 1) for line in lines if re.match(r"\w+=", line))
    environment["STATE_DIRECTORY"] = f"/var/lib/{settings['StateDirectory']}"
    arguments = []
    for word in settings["ExecStart"].split():
        if word.startswith("${"):
            arguments.append(environment[word[2:-1]])
        elif word.startswith("$"):
            arguments += environment[word[1:]].split()
        else:
            arguments.append(word)
    assert arguments.pop(0) == PROGRAM
    return arguments


def compose() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = yaml.safe_load((EXAMPLE / "compose.yaml").read_text())["services"]
    return services


def typed(readme: Path) -> list[list[str]]:
    """The arguments of each `mnemesh …` that a README's console blocks show."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", readme.read_text(), re.DOTALL):
        for line in re.findall(r"^\w*\$ (.*)", block.replace("\\\n", " "), re.MULTILINE):
            words = shlex.split(line, comments=True)
            for before, word, place in zip(["", *words], words, range(1, len(words) + 1), strict=False):
                if (word == "mnemesh" and before not in ("-u", "--user-group")) or word.endswith("/bin/mnemesh"):
                    found.append(words[place:])
                    break
    return found


@pytest.mark.parametrize("name", ["hub", "edge"])
def test_a_unit_starts_what_the_command_understands_and_waits_until_it_has_drained(name: str) -> None:
    understood(arguments_of(name))
    settings = unit(name)
    assert settings["KillMode"] == "mixed"  # else nats-server is told to end before those who drain into it
    assert settings["KillSignal"] == "SIGTERM"
    assert float(settings["TimeoutStopSec"]) > DRAIN_S[name]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
@pytest.mark.parametrize("name", ["hub", "edge"])
def test_systemd_finds_nothing_amiss_with_a_unit(name: str, tmp_path: Path) -> None:
    text = (EXAMPLE / f"mnemesh-{name}.service").read_text()
    installed = tmp_path / f"mnemesh-{name}.service"
    installed.write_text(text.replace(PROGRAM, sys.executable))  # it looks whether the program is there
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", installed], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", compose())
def test_a_container_starts_what_the_command_understands_and_waits_until_it_has_drained(name: str) -> None:
    service = compose()[name]
    understood(service["command"])
    assert float(service["stop_grace_period"].removesuffix("s")) > DRAIN_S["hub" if name == "hub" else "edge"]
    assert (EXAMPLE / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).samefile(EXAMPLE / "Dockerfile")


def test_a_container_is_named_as_its_site_and_keeps_its_data() -> None:
    services = compose()
    devices = {name: service["command"] for name, service in services.items() if name != "hub"}
    assert len(devices) == 3
    assert [command[command.index("--site") + 1] for command in devices.values()] == list(devices)
    assert all(service["volumes"] == [f"{name}:/data"] for name, service in services.items())


@pytest.mark.parametrize("readme", [EXAMPLE / "README.md", ROOT / "README.md"], ids=["example", "project"])
def test_what_a_readme_types_is_understood(readme: Path) -> None:
    commands = typed(readme)
    assert len(commands) > 3
    for command in commands:
        understood(command)


def test_what_pip_installs_has_the_contract_with_it(tmp_path: Path) -> None:
    """The image has no checkout beside the package."""
    unneeded = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "mnemesh-data", "demo-output", "tests"
    )
    source = shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=unneeded)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("mnemesh_server-*.whl"))) as wheel:
        assert wheel.read("cli/subjects.yaml") == (ROOT / "subjects.yaml").read_bytes()


def test_the_files_of_wants_and_of_what_may_leave_are_read() -> None:
    near, weather = read_interest(EXAMPLE / "interest.yaml").wants
    assert (near.hops, weather.regions) == (2, ["north"])
    policy = parse(read_policy(EXAMPLE / "policy.yaml"))
    told = {kind: policy.leaves("demo", kind, "north").tells_fields for kind in ("meter", "forecast", "transformer")}
    assert told == {"meter": False, "forecast": False, "transformer": True}
