"""Questions that span sites: a hub's devices answer too, a device's hub does, and the answer says who did not."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from sites import TENANT, HubSite, alice_at, current, device, since, status_of

from bench.cable import Cable
from cli.devices import Devices
from mnemesh import Memory, messages
from mnemesh.errors import Timeout
from mnemesh.messages import Hits, Interest, SiteCoverage, Traversal, Want

KEEPS_ALL = "version: 1\notherwise: nothing\n"
ONLY_SCORES = "version: 1\notherwise: scores\n"
LONG_MS = 30_000


async def asked(memory: Memory, state: str, **search: Any) -> tuple[Hits, SiteCoverage]:
    """The answer to a search as soon as it says of the other site that it is in this state."""
    while True:
        found = await memory.search_embedding([1.0, 0.0], space="v", **search)
        assert found.coverage is not None
        if found.coverage.sites and found.coverage.sites[0].state == state:
            return found, found.coverage.sites[0]
        await asyncio.sleep(0)


async def test_a_hub_finds_by_score_what_a_device_does_not_send(hub: HubSite, tmp_path: Path) -> None:
    async with (
        device(hub, tmp_path / "d", policy=ONLY_SCORES) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        await current(node)
        await there.set_context("hub:1", attributes={"n": 1}, vectors={"v": [0.0, 1.0]})
        await here.set_context("secret:1", attributes={"n": 2}, vectors={"v": [1.0, 0.1]}, text="hidden words")
        found, site = await asked(there, "answered", output_fields=["n"], include_vectors=True)
        while len(found.hits) < 2:
            found, site = await asked(there, "answered", output_fields=["n"], include_vectors=True)
        best = found.hits[0]
        assert (best.entity_id, best.attributes, best.vector) == ("secret:1", None, None)
        assert (site.site, site.restricted) == ("sub7", True)
        assert found.coverage is not None
        assert found.coverage.complete
        filtered, _ = await asked(there, "answered", filter={"n": 2})
        assert filtered.hits == []  # to be found by what may not leave would tell it
        words = await there.search_text("hidden")
        assert [hit.entity_id for hit in words.hits] == ["secret:1"]
        only_here = await there.search_embedding([1.0, 0.0], space="v", scope="here")
        assert [hit.entity_id for hit in only_here.hits] == ["hub:1"]


async def test_a_device_that_lets_nothing_out_has_refused(hub: HubSite, tmp_path: Path) -> None:
    async with (
        device(hub, tmp_path / "d", policy=KEEPS_ALL) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        await current(node)
        await there.set_context("hub:1", vectors={"v": [0.0, 1.0]})
        await here.set_context("secret:1", vectors={"v": [1.0, 0.1]})
        found, _ = await asked(there, "refused")
        assert [hit.entity_id for hit in found.hits] == ["hub:1"]
        assert found.coverage is not None
        assert not found.coverage.complete


async def test_a_device_that_is_cut_off_is_named_with_since_when(hub: HubSite, tmp_path: Path) -> None:
    cable = Cable(hub.options.leaf_port)
    async with (
        cable.laid() as port,
        device(hub, tmp_path / "d", line=f"nats://127.0.0.1:{port}") as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        await current(node)
        written = await here.set_context("own", vectors={"v": [1.0, 0.0]}, edges=[{"relation": "r", "target_id": "x"}])
        await there.get_context("own", consistency=since(written), budget_ms=LONG_MS)
        await asked(there, "answered")
        cable.cut()
        found, site = await asked(there, "unreachable")  # by its own deadline, long before it counts as gone
        assert [hit.entity_id for hit in found.hits] == ["own"]
        assert site.silent_s is not None
        away, hub_coverage = await asked(here, "unreachable")
        assert [hit.entity_id for hit in away.hits] == ["own"]
        assert (hub_coverage.site, hub_coverage.silent_s is not None) == ("hub", True)
        walked = await here.traverse("own", depth=2)
        assert [node.entity_id for node in walked.nodes] == ["own", "x"]
        assert not walked.coverage.complete


async def test_a_question_that_its_hub_cannot_answer_takes_the_hub_from_no_other_agent_of_a_device(
    hub: HubSite, tmp_path: Path
) -> None:
    async with (
        device(hub, tmp_path / "d") as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        await there.set_context("v:1", vectors={"v": [1.0, 0.0]})
        await current(node)
        await asked(here, "answered")
        while True:
            wrong = (await here.search_embedding([1.0], space="v")).coverage
            right = (await here.search_embedding([1.0, 0.0], space="v")).coverage
            assert wrong is not None
            assert right is not None
            if wrong.sites[0].state == right.sites[0].state == "answered":
                break
        assert (wrong.sites[0].code, wrong.complete) == ("bad_request", False)
        assert (right.sites[0].code, right.complete) == ("", True)
        while True:
            with contextlib.suppress(Timeout):
                await here.search_embedding([1.0, 0.0], space="v", budget_ms=1)
            right = (await here.search_embedding([1.0, 0.0], space="v")).coverage
            assert right is not None
            if right.sites[0].state == "answered":
                break


async def test_a_hub_names_every_device_that_may_connect_and_none_that_may_not(hub: HubSite, tmp_path: Path) -> None:
    await hub.enrol("never", tmp_path / "never")
    async with (
        device(hub, tmp_path / "d") as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        written = await here.set_context("v:1", vectors={"v": [1.0, 0.0]})
        await there.get_context("v:1", consistency=since(written), budget_ms=LONG_MS)
        while sites_of(found := await there.search_text("x")) != {"never": "unreachable", "sub7": "answered"}:
            pass
        assert found.coverage is not None
        assert found.coverage.sites[0].silent_s is None
        Devices(hub.options.data).revoke("sub7")  # its mark stays in the hub's log
        await hub.say_sites()
        while sites_of(await there.search_text("x")) != {"never": "unreachable"}:
            pass


async def test_how_long_a_device_is_silent_is_told_also_while_nobody_listens_to_it(
    hub: HubSite, tmp_path: Path
) -> None:
    async with device(hub, tmp_path / "d"), alice_at(hub.server) as there:
        while sites_of(await there.search_text("x")) != {"sub7": "answered"}:
            pass
        hub.for_devices.stop()
        await hub.for_devices.ended.wait()
        while sites_of(found := await there.search_text("x")) != {"sub7": "unreachable"}:
            pass
        while silent_s(await there.search_text("x")) <= silent_s(found):
            pass


def silent_s(found: Hits) -> float:
    assert found.coverage is not None
    assert found.coverage.sites[0].silent_s is not None
    return found.coverage.sites[0].silent_s


def sites_of(found: Hits) -> dict[str, str]:
    assert found.coverage is not None
    return {site.site: site.state for site in found.coverage.sites}


async def test_a_device_finds_what_its_hub_has_and_walks_on_there(hub: HubSite, tmp_path: Path) -> None:
    async with (
        device(hub, tmp_path / "d") as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        await there.set_context("b", type="bus", edges=[{"relation": "feeds", "target_id": "c"}], text="far away")
        await there.set_context("v:1", vectors={"v": [1.0, 0.0]})
        await current(node)
        await here.set_context("a", edges=[{"relation": "feeds", "target_id": "b"}])
        walked = await reached(here, "c")
        assert [(node.entity_id, node.depth, node.via) for node in walked.nodes] == [
            ("a", 0, None),
            ("b", 1, "a"),
            ("c", 2, "b"),
        ]
        assert [site.site for site in walked.coverage.sites] == ["hub"]
        assert [hit.entity_id for hit in (await asked(here, "answered"))[0].hits] == ["v:1"]
        assert [hit.entity_id for hit in (await here.search_text("far")).hits] == ["b"]
        assert (await here.search_text("far", scope="here")).hits == []


async def test_a_device_that_lets_nothing_out_walks_on_where_its_hub_led_it(hub: HubSite, tmp_path: Path) -> None:
    async with (
        device(hub, tmp_path / "d", policy=KEEPS_ALL) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        for near, far in ("ab", "bc"):
            await there.set_context(near, edges=[{"relation": "feeds", "target_id": far}])
        await current(node)
        assert not (await reached(here, "c")).restricted


async def reached(memory: Memory, entity_id: str) -> Traversal:
    while True:
        walked = await memory.traverse("a", depth=3)
        if entity_id in [node.entity_id for node in walked.nodes]:
            return walked


async def test_a_device_is_refused_the_memory_of_tenants_that_it_was_not_enrolled_for(
    hub: HubSite, tmp_path: Path
) -> None:
    await hub.enrol("sub7", tmp_path / "d", tenants=["other"])
    async with (
        device(hub, tmp_path / "d", interest=Interest(wants=[Want(tenant=TENANT)])) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        await there.set_context("t:1", attributes={"n": 1}, vectors={"v": [1.0, 0.0]})
        found, _ = await asked(here, "refused")
        assert found.hits == []
        status: messages.EdgeStatus = await status_of(node)
        assert not status.current
        assert status.downlinked == 0
        assert "was not enrolled for tenant" in status.trouble
