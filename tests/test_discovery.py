"""Discovery as ADR-32 has it: what `nats micro ls`, `info` and `stats` read."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from conftest import OpenAsker, OpenLink
from desk import Desk, set_context

from mnemesh import subjects
from mnemesh.asker import Asker
from mnemesh.call import Call
from mnemesh.errors import NotFound, Unavailable
from mnemesh.host import hosted
from mnemesh.messages import SetContext

IDENTITY = {"type", "name", "id", "version", "metadata"}


async def ask(operator: Asker, verb: str, *tail: str) -> dict[str, Any]:
    message = await operator.inbox.request(".".join(("$SRV", verb, *tail)), b"", budget_s=5)
    reply = json.loads(message.data)
    assert isinstance(reply, dict)
    return reply


async def test_ping_info_and_stats_have_the_fields_of_the_adr(open_link: OpenLink, open_asker: OpenAsker) -> None:
    operator, desk = await open_asker("operator"), Desk(await open_link("gateway"))
    async with hosted(desk):
        ping, info, stats = [await ask(operator, verb) for verb in ("PING", "INFO", "STATS")]
    assert set(ping) == IDENTITY
    assert set(info) == IDENTITY | {"description", "endpoints"}
    assert set(stats) == IDENTITY | {"started", "endpoints"}
    for verb, reply in (("ping", ping), ("info", info), ("stats", stats)):
        assert reply["type"] == f"io.nats.micro.v1.{verb}_response"
        assert (reply["name"], reply["id"]) == ("mnemesh-gateway", desk.instance)
        assert reply["metadata"]["contract"] == subjects.CONTRACT
        assert all(isinstance(value, str) for value in reply["metadata"].values())
        assert reply["version"].count(".") == 2
    assert (
        info["description"]
        == "Stands where the gateway would. `set_context` runs `work`, which a test may change at any time."
    )
    assert datetime.fromisoformat(stats["started"]).tzinfo is not None
    endpoints = {endpoint["name"]: endpoint for endpoint in info["endpoints"]}
    assert set(endpoints) == {"set_context", "upsert_embedding", "forget", "ingest", "derive"}
    assert endpoints["set_context"] == {
        "name": "set_context",
        "subject": subjects.SET_CONTEXT.pattern(),
        "queue_group": "gateway",
        "metadata": {"request": "SetContext", "reply": "Written"},
    }


async def test_an_actor_answers_also_by_name_and_by_id_and_only_to_its_own(
    open_link: OpenLink, open_asker: OpenAsker
) -> None:
    operator, desk = await open_asker("operator"), Desk(await open_link("gateway"))
    async with hosted(desk):
        for verb in ("PING", "INFO", "STATS"):
            assert (await ask(operator, verb, "mnemesh-gateway"))["id"] == desk.instance
            assert (await ask(operator, verb, "mnemesh-gateway", desk.instance))["id"] == desk.instance
            for stranger in (("mnemesh-router",), ("mnemesh-gateway", "somebody")):
                with pytest.raises(Unavailable):
                    await ask(operator, verb, *stranger)
    with pytest.raises(Unavailable):
        await ask(operator, "PING")


async def test_stats_count_requests_and_errors(open_link: OpenLink, open_asker: OpenAsker) -> None:
    operator, alice = await open_asker("operator"), await open_asker("acme.alice")

    async def refuse(request: SetContext, call: Call) -> Any:
        raise NotFound("no such thing")

    desk = Desk(await open_link("gateway"))
    async with hosted(desk):
        for _ in range(3):
            await set_context(alice)
        desk.work = refuse
        for _ in range(2):
            with pytest.raises(NotFound):
                await set_context(alice)
        endpoints = {endpoint["name"]: endpoint for endpoint in (await ask(operator, "STATS"))["endpoints"]}
    stats = endpoints["set_context"]
    assert (stats["num_requests"], stats["num_errors"]) == (5, 2)
    assert stats["last_error"] == "not_found: no such thing"
    assert stats["data"] == {"codes": {"ok": 3, "not_found": 2}}
    assert stats["average_processing_time"] == pytest.approx(stats["processing_time"] / 5, abs=1)
    assert 0 < stats["processing_time"] < 5_000_000_000
    assert endpoints["forget"]["num_requests"] == endpoints["forget"]["average_processing_time"] == 0
