"""The metrics and health page: its values are what happened."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.error
import urllib.request
from typing import Any

import pytest
from conftest import OpenAsker, OpenLink
from desk import Desk, Held, SmallDesk, set_context
from prometheus_client.parser import text_string_to_metric_families
from test_connection import connected_again, lost

from cli.server import NatsServer
from mnemesh.call import Call
from mnemesh.errors import NotFound, Unavailable
from mnemesh.host import hosted
from mnemesh.messages import SetContext
from mnemesh.stats import Gauge
from services.observer import observed

HOST = "127.0.0.1"


def fetch(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


async def page(port: int, path: str) -> tuple[int, str]:
    return await asyncio.to_thread(fetch, f"http://{HOST}:{port}{path}")


async def values(port: int) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    status, text = await page(port, "/metrics")
    assert status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


class Measured(SmallDesk):
    def gauges(self) -> list[Gauge]:
        return [Gauge("answer", "What it is", lambda: 42.0)]


async def test_the_page_says_what_happened(open_link: OpenLink, open_asker: OpenAsker) -> None:
    alice, held = await open_asker("acme.alice"), Held()

    async def refuse(request: SetContext, call: Call) -> Any:
        raise NotFound("no")

    desk = Measured(await open_link("gateway"))
    of = {"role": "gateway", "operation": "set_context"}
    async with hosted(desk), observed([desk], host=HOST, port=0) as port:
        for _ in range(3):
            await set_context(alice)
        desk.work = refuse
        with pytest.raises(NotFound):
            await set_context(alice)
        desk.work = held
        busy = [asyncio.ensure_future(set_context(alice))]
        await held.begun.acquire()
        busy.append(asyncio.ensure_future(set_context(alice)))
        await asyncio.sleep(0)
        await alice.link.flush()
        await desk.link.flush()
        seen = await values(port)
        assert seen[key("mnemesh_requests_total", code="ok", **of)] == 3
        assert seen[key("mnemesh_requests_total", code="not_found", **of)] == 1
        assert seen[key("mnemesh_request_seconds_count", **of)] == 4
        assert seen[key("mnemesh_request_seconds_bucket", le="+Inf", **of)] == 4
        assert 0 < seen[key("mnemesh_request_seconds_sum", **of)] < 10
        assert seen[key("mnemesh_in_flight", **of)] == 1
        assert seen[key("mnemesh_mailbox_waiting", **of)] == 1
        assert seen[key("mnemesh_connected", role="gateway")] == 1
        assert seen[key("mnemesh_gateway_answer")] == 42
        held.release.set()
        await asyncio.gather(*busy)
        idle = await values(port)
        assert idle[key("mnemesh_in_flight", **of)] == idle[key("mnemesh_mailbox_waiting", **of)] == 0
        assert idle[key("mnemesh_requests_total", code="ok", **of)] == 5
        assert any(name == "process_resident_memory_bytes" for name, _ in idle)


async def test_health_is_lost_with_the_connection_and_comes_back_with_it(
    own_mesh_server: NatsServer, open_link: OpenLink
) -> None:
    desk = Desk(await open_link("gateway", own_mesh_server))
    async with hosted(desk), observed([desk], host=HOST, port=0) as port:
        status, body = await page(port, "/healthz")
        assert (status, json.loads(body)["actors"]) == (200, {"gateway": "connected"})
        gone = asyncio.ensure_future(lost(desk.link))
        await asyncio.sleep(0)
        await own_mesh_server.kill()
        await gone
        status, body = await page(port, "/healthz")
        assert (status, json.loads(body)["healthy"]) == (503, False)
        assert (await values(port))[key("mnemesh_connected", role="gateway")] == 0
        await own_mesh_server.start()
        await connected_again(desk.link)
        assert (await page(port, "/healthz"))[0] == 200


async def test_a_taken_port_is_unavailable_and_named(open_link: OpenLink) -> None:
    desk = Desk(await open_link("gateway"))
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=f"{port}.*another port"):
            async with observed([desk], host=HOST, port=port):
                pytest.fail("it listens")


async def test_the_port_is_the_one_that_was_asked_for_and_free_again_afterwards(open_link: OpenLink) -> None:
    desk = Desk(await open_link("gateway"))
    async with observed([desk], host=HOST, port=0) as port:
        pass
    async with observed([desk], host=HOST, port=port) as again:
        assert again == port
        assert (await page(port, "/healthz"))[0] == 200
