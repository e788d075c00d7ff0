"""The sites ledger: what five sites acknowledged is on all of them, once, whatever was cut and killed meanwhile.

    python -m tests.site_ledger --writes 1000000 --seed 7

A hub and four devices, all processes of their own; each device wants all of the hub's memory, and has a cable of its
own. Writers at every site write to entities of their own and to shared ones, and repeat each write under its id until
it is answered. Meanwhile cables are cut without a sign and healed, and processes are killed (SIGKILL): devices, their
servers, the hub's server and services. Then all is healed, and the audit (`site_audit.py`) compares the sites with the
ledger.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import secrets
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mnemesh
from mnemesh.messages import Interest, Want
from tests.fleet import HUB, Fleet, fleet, kill
from tests.site_audit import Audit
from tests.site_writers import Ledger, Writer

TENANT = "ledger"
DEVICES = ("sub1", "sub2", "sub3", "sub4")
WRITERS = 2
"""At each site."""
EVERYTHING = Interest(wants=[Want(tenant=TENANT)], most_entities=10_000_000, most_bytes=1 << 40)
PATIENCE_S = 120.0
SLOWEST_PER_S = 250
"""Fewer writes a second than that, chaos and catching up each, and a run is given up."""
WRITES_A_DEED = 2500

Deed = Callable[[], Coroutine[Any, Any, None]]


class Chaos:
    """Cuts and kills, a number of them spread over the writes. `deeds` counts them."""

    def __init__(self, fleet: Fleet, ledger: Ledger) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._random = random.Random(f"{ledger.seed} chaos")
        self.deeds: Counter[str] = Counter()

    async def run(self, writes: int) -> None:
        """Do harm until so much is written. When it returns, every cable is whole."""
        deeds = self._endlessly()
        count = max(1, writes // WRITES_A_DEED)
        async with asyncio.TaskGroup() as hands:
            for number in range(1, count + 1):
                await self._ledger.written.reached(round(writes * (number - self._random.random()) / count))
                name, deed = next(deeds)
                self.deeds[name] += 1
                hands.create_task(deed())
            await self._ledger.written.reached(writes)
        for device in self._fleet.devices.values():
            device.cable.heal()

    def _endlessly(self) -> Iterator[tuple[str, Deed]]:
        """Every deed in turn, in another order each time."""
        fleet = self._fleet
        deeds: list[tuple[str, Deed]] = [
            (f"kill server of {site}", partial(self._kill_server, site)) for site in fleet.sites
        ]
        deeds += [(f"kill {name} of the hub", partial(self._kill_service, name)) for name in fleet.services]
        for name in fleet.devices:
            deeds += [(f"cut {name}", partial(self._cut, name))] * 2
            deeds.append((f"kill {name}", partial(self._kill_device, name)))
        while True:
            self._random.shuffle(deeds)
            yield from deeds

    async def _cut(self, name: str) -> None:
        """Mostly for a moment; now and then for longer than connections live without an answer."""
        cable = self._fleet.devices[name].cable
        cable.cut()
        await asyncio.sleep(
            self._random.uniform(11, 14) if self._random.random() < 0.15 else self._random.uniform(0.2, 5)
        )
        cable.heal()

    async def _kill_server(self, site: str) -> None:
        kill(self._fleet.server_pid(site))

    async def _kill_device(self, name: str) -> None:
        kill(self._fleet.devices[name].pid)

    async def _kill_service(self, name: str) -> None:
        kill(self._fleet.services[name].pid)


class Report(NamedTuple):
    """What a run did. `findings` is empty when the sites kept their word."""

    seed: int
    writes: int
    seconds: tuple[float, float, float]
    """Of writing, of catching up after that, and of the audit."""
    outcomes: Counter[str]
    deeds: Counter[str]
    facts: Counter[str]
    digest: str | None
    findings: list[str]

    def __str__(self) -> str:
        writing_s, catching_up_s, audit_s = self.seconds
        lines = [
            f"{self.writes} writes at {1 + len(DEVICES)} sites in {writing_s:.0f} s, seed {self.seed}: "
            f"{self.writes / writing_s:.0f} a second; all were everywhere {catching_up_s:.0f} s later; "
            f"audited in {audit_s:.0f} s",
            _counts("writes", self.outcomes),
            _counts("deeds", self.deeds),
            _counts("found", self.facts),
            f"digest  {self.digest}",
        ]
        lines += [f"WRONG: {finding[:2000]}" for finding in self.findings[:40]]
        lines.append(f"{len(self.findings)} findings" if self.findings else "the sites agree with the ledger")
        return "\n".join(lines)


def _counts(title: str, counts: Counter[str]) -> str:
    return f"{title:8}" + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


async def run(data: Path, *, writes: int, seed: int, writers: int = WRITERS) -> Report:
    """Write so much through cuts and kills on a fleet in `data`, then audit."""
    now = asyncio.get_running_loop().time
    ledger = Ledger(seed)
    agents = {site: [f"{site}-{index}" for index in range(writers)] for site in (HUB, *DEVICES)}
    bound_s = PATIENCE_S + writes / SLOWEST_PER_S
    async with (
        fleet(data, devices=DEVICES, tenant=TENANT, agents=agents, interest=EVERYTHING) as sites,
        contextlib.AsyncExitStack() as connections,
    ):
        memories = {
            site: [
                await connections.enter_async_context(
                    mnemesh.connect(credentials=sites.credential(site, f"{TENANT}.{agent}").path)
                )
                for agent in names
            ]
            for site, names in agents.items()
        }
        chaos = Chaos(sites, ledger)
        began = now()
        async with asyncio.timeout(bound_s), asyncio.TaskGroup() as tasks:
            for site, here in memories.items():
                for memory in here:
                    tasks.create_task(Writer(memory, ledger, site=site).run(writes))
            await chaos.run(writes)
        written = now()
        audit = Audit(sites, ledger, {site: here[0] for site, here in memories.items()})
        async with asyncio.timeout(bound_s):
            await audit.wait()
        caught_up = now()
        await audit.run()
        return Report(
            seed=seed,
            writes=ledger.written.value,
            seconds=(written - began, caught_up - written, now() - caught_up),
            outcomes=ledger.outcomes,
            deeds=chaos.deeds,
            facts=audit.facts,
            digest=audit.digest,
            findings=audit.findings,
        )


def main() -> int:
    """Run as much as asked; the folder of a run that found something stays."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.site_ledger", description="The sites ledger, as long as you like."
    )
    parser.add_argument("--writes", type=int, default=1_000_000, help="over all sites (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of the chaos and the writes")
    parser.add_argument("--writers", type=int, default=WRITERS, help="at each site (default: %(default)s)")
    flags = parser.parse_args()
    data = Path(tempfile.mkdtemp(prefix="mnemesh-site-ledger-"))
    print(f"seed {flags.seed}, in {data}", flush=True)
    report = asyncio.run(run(data, writes=flags.writes, seed=flags.seed, writers=flags.writers))
    print(report)
    if report.findings:
        return 1
    shutil.rmtree(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
