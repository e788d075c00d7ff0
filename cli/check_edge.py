"""What `mnemesh doctor` looks at between a hub and its devices: on a hub each device, on a device its hub."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from cli.devices import Devices
from cli.finding import Finding, ok, warning, wrong
from cli.server_config import ServerOptions
from mnemesh import messages, subjects
from mnemesh.asker import Asker
from mnemesh.errors import MnemeshError

LARGEST_OFFSET_MS = 5_000
"""From where a clock is said to be wrong; what it decides is who of two concurrent writers wins."""
SILENT_S = 60.0
REFUSED = (
    "the hub's log names each and why; install the same release on both, and use one model for a space everywhere. "
    "What was refused stays in the device's log, and is not sent again"
)


async def devices(asker: Asker, options: ServerOptions) -> AsyncIterator[Finding]:
    """Each device that may connect to this hub."""
    try:
        asked = messages.AskDevices(quarantined=True)
        seen = (await asker.ask(subjects.DEVICES, subjects.devices(), asked)).devices
    except MnemeshError as error:
        yield wrong(
            f"nobody tells of the devices: {error.message}", f"see {options.data / 'logs'}: the hub's log says why"
        )
        return
    enrolled = {device.name for device in Devices(options.data).list()}
    findings = [finding for device in seen if device.site in enrolled for finding in _device(device)]
    for finding in findings:
        yield finding
    if not findings:
        yield ok(f"{len(enrolled)} devices may connect; nothing is wrong with those that have")


def _device(device: messages.DeviceSeen) -> Iterator[Finding]:
    name = device.site
    if device.silent_s > SILENT_S:
        yield warning(
            f"device {name} has been silent for {device.silent_s:.0f} s",
            f"on it, `mnemesh doctor --data` its folder says why; if it is gone for good, `mnemesh edge revoke {name}`",
        )
    if device.quarantined:
        yield wrong(
            f"{device.quarantined:,} events of {name} are put aside: they were stamped far ahead of this hub's clock",
            f"set {name}'s clock (NTP), stop it, `mnemesh edge restamp` there and start it: what is put aside takes "
            "effect then",
        )
    if device.refused:
        yield wrong(
            f"{device.refused:,} events of {name} were refused: this hub cannot read them, they are not its own, or "
            "their vectors do not fit their spaces here",
            REFUSED,
        )
    if device.clock_offset_ms is not None and abs(device.clock_offset_ms) > LARGEST_OFFSET_MS:
        yield warning(
            f"the clock of device {name} is off by {device.clock_offset_ms / 1000:+.1f} s",
            f"set {name}'s clock (NTP): of two that write the same at once, the one whose clock is ahead wins",
        )
    if device.contract not in (None, subjects.CONTRACT):
        yield warning(
            f"device {name} runs contract {device.contract}; this hub has {subjects.CONTRACT}",
            "they understand each other as far as both know; install the same release on both",
        )


async def hub(asker: Asker, options: ServerOptions) -> AsyncIterator[Finding]:
    """How this device stands with its hub."""
    site = options.site
    try:
        status = await asker.ask(subjects.EDGE_STATUS, subjects.edge_status(site), messages.Status())
    except MnemeshError as error:
        yield wrong(f"the device does not say how it stands with its hub: {error.message}", "restart it")
        return
    if status.trouble:
        yield wrong(
            f"this device and its hub are at odds: {status.trouble}",
            "give each device a name and a folder of its own, and enrol it for the tenants that it wants; what "
            f"{site} wrote stays in its log until then",
        )
    if not status.linked:
        yield warning(
            f"the hub at {options.hub} has not answered for {status.silent_s:.0f} s; {status.waiting:,} events wait",
            f"is it in reach, and this device enrolled (`mnemesh edge enrol {site}` at the hub)? It serves meanwhile",
        )
        return
    if abs(status.clock_offset_ms) > LARGEST_OFFSET_MS:
        yield warning(
            f"this device's clock is off by {status.clock_offset_ms / 1000:+.1f} s from its hub's", "set it (NTP)"
        )
    if status.put_aside:
        yield wrong(
            f"the hub put aside {status.put_aside:,} events of this device, stamped while its clock was ahead",
            "set its clock (NTP), stop it, `mnemesh edge restamp` and start it",
        )
    if status.untold:
        yield warning(
            f"what is written here of {', '.join(status.untold)} stays here: this device was not enrolled for that",
            f"if its hub is to have it, `mnemesh edge enrol {site}` with all its tenants at the hub; what was passed "
            "over until then is not sent later",
        )
    if status.refused:
        yield wrong(f"the hub refused {status.refused:,} events of this device, in whole or in part", REFUSED)
    if status.hub_contract != subjects.CONTRACT:
        yield warning(
            f"the hub runs contract {status.hub_contract or 'unknown'}; this device has {subjects.CONTRACT}",
            "they understand each other as far as both know; install the same release on both",
        )
    if not status.trouble:
        waits = f"{status.waiting:,} events wait to be sent, for {status.lag_s:.1f} s"
        yield ok(f"linked to hub {status.hub}: {waits}")
