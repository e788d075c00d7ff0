"""What a hub's router asks its devices, and what their answers count for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from sites import HubSite, alice_at, since, stolen

from cli.operator import asking
from mnemesh import kv, messages, subjects, wire
from mnemesh.contract import AnyOperation
from mnemesh.messages import Coverage, Hit, Hits, Node, Traversal

MOST_LEAVES = "version: 1\nrules: [{type: meter, leaves: nothing}]\n"


class Impostor:
    """A device that answers what it likes. Keeps what it was asked."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.asked: list[Any] = []

    async def speak(self) -> None:
        """Be seen by the hub."""
        while True:
            with contextlib.suppress(nats.errors.Error):  # until the leaf is there
                subject = subjects.uplink_position("sub7")
                await self._client.request(subject, wire.encode(messages.AskPosition()), timeout=1.0)
                return

    async def answer(self, operation: AnyOperation, reply: Callable[[Any], object]) -> None:
        """Answer a question of the hub's router by what `reply` makes of the request; with `None` not at all."""

        async def on_asked(message: Msg) -> None:
            request = wire.decode_as(message.data, operation.request)
            self.asked.append(request)
            told = reply(request)
            if told is not None:
                await self._client.publish(message.reply, wire.encode(told))

        await self._client.subscribe(operation.pattern(site="sub7"), cb=on_asked)


@contextlib.asynccontextmanager
async def impostor(hub: HubSite, data: Path) -> AsyncIterator[Impostor]:
    """In the place of an enrolled device."""
    await hub.enrol("sub7", data)
    async with stolen(hub, data) as client:
        yield Impostor(client)


WHOLE = Coverage(answered=64, total=64)


def tells(edges: Mapping[str, str], **says: Any) -> Callable[[Any], Traversal]:
    """What a device answers that knows these edges."""

    def reply(request: Any) -> Traversal:
        nodes = [Node(entity_id=start, depth=0) for start in request.start]
        nodes += [
            Node(entity_id=edges[near], depth=1, via=near, relation="r") for near in request.start if near in edges
        ]
        return Traversal(**({"truncated": False, "watermark": {}, "coverage": WHOLE} | says), nodes=nodes)

    return reply


async def test_a_hub_that_keeps_something_back_names_to_its_devices_only_what_its_agent_named(
    hub: HubSite, tmp_path: Path
) -> None:
    async with asking(hub.options, "test") as operator:
        await kv.put(operator.inbox, subjects.POLICIES.name, "own", MOST_LEAVES.encode())
    async with impostor(hub, tmp_path / "d") as thief, alice_at(hub.server) as there:
        await thief.answer(subjects.DEVICE_TRAVERSE, tells({}))
        await there.set_context("meter:1", type="meter", edges=[{"relation": "r", "target_id": "customer:1"}])
        written = await there.set_context("customer:1", edges=[{"relation": "r", "target_id": "home:1"}])
        while not (await there.traverse("meter:1", depth=3, consistency=since(written))).restricted:
            pass
        while not thief.asked:
            await thief.speak()
            walked = await there.traverse("meter:1", depth=3)
        assert [node.entity_id for node in walked.nodes] == ["meter:1", "customer:1", "home:1"]
        assert {start for request in thief.asked for start in request.start} == {"meter:1"}


async def test_a_device_that_does_not_answer_is_asked_once_a_walk(hub: HubSite, tmp_path: Path) -> None:
    async with impostor(hub, tmp_path / "d") as thief, alice_at(hub.server) as there:
        await thief.answer(subjects.DEVICE_TRAVERSE, lambda request: None)
        for near, far in ("ab", "bc", "cd"):
            written = await there.set_context(near, edges=[{"relation": "r", "target_id": far}])
        while not thief.asked:
            await thief.speak()
            walked = await there.traverse("a", depth=4, consistency=since(written))
        assert [node.entity_id for node in walked.nodes] == ["a", "b", "c", "d"]
        assert [site.state for site in walked.coverage.sites] == ["unreachable"]
        assert [request.start for request in thief.asked] == [["a"]]


async def test_a_walk_is_as_whole_as_the_least_of_its_hops(hub: HubSite, tmp_path: Path) -> None:
    part = tells({"a": "b"}, watermark={"sub7": 5}, coverage=Coverage(answered=60, total=64), restricted=True)
    whole = tells({"b": "c"}, watermark={"sub7": 9})
    async with impostor(hub, tmp_path / "d") as thief, alice_at(hub.server) as there:
        await thief.answer(
            subjects.DEVICE_TRAVERSE, lambda request: (part if request.start == ["a"] else whole)(request)
        )
        await there.set_context("a", attributes={"n": 1})
        while not (walked := await there.traverse("a", depth=3)).nodes[1:]:
            await thief.speak()
        assert [node.entity_id for node in walked.nodes] == ["a", "b", "c"]
        (site,) = walked.coverage.sites
        assert (site.state, site.watermark, site.complete, site.restricted) == ("answered", {"sub7": 5}, False, True)


async def test_a_hit_of_a_device_stands_in_for_none_of_its_hub(hub: HubSite, tmp_path: Path) -> None:
    forged = [Hit(entity_id="own", score=9.0, attributes={"n": 666}), Hit(entity_id="other", score=0.5)]
    odd = [Hit(entity_id=f"odd:{score}", score=score) for score in (math.nan, math.inf, -math.inf)]
    async with impostor(hub, tmp_path / "d") as thief, alice_at(hub.server) as there:
        await thief.answer(subjects.DEVICE_SEARCH, lambda request: Hits(hits=[*odd, *forged], watermark={}))
        for name, vector in (("own", [1.0, 1.0]), ("best", [1.0, 0.0]), ("last", [-1.0, 0.0])):
            written = await there.set_context(name, attributes={"n": 1}, vectors={"v": vector})
        await there.get_context("last", consistency=since(written))
        found: list[Hit] = []
        while "other" not in [hit.entity_id for hit in found]:
            await thief.speak()
            found = (await there.search_embedding([1.0, 0.0], space="v", output_fields=["n"])).hits
        assert [hit.entity_id for hit in found] == ["best", "own", "other", "last"]
        assert found[1].attributes == {"n": 1}
