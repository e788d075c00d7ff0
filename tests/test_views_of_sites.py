"""Views where whole processes die, and where a device is told no more by a vector than by what it is made of."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from conftest import server_options
from sites import TENANT, HubSite, alice_at, current, device
from test_views import EMBEDDER, is_of, until, vector_of

from cli.main import main
from cli.mesh import Mesh, MeshOptions
from cli.operator import asking
from cli.view import put_view
from mnemesh import Memory, connect, kv, subjects
from mnemesh.embedding import embedder
from mnemesh.errors import NotFound
from mnemesh.host import hosted
from mnemesh.messages import Interest, Status, ViewsSeen, Want
from services.view import View
from services.views import Views

NOTES = f"""
name: notes
tenant: acme
type: note
attributes: [title]
template: "{{title}}"
space: notes
embedder: {EMBEDDER}
"""


async def command(*arguments: str) -> int:
    return await asyncio.to_thread(main, ["view", *arguments])


async def test_a_mesh_whose_views_are_killed_has_every_vector_in_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = MeshOptions(server=server_options(tmp_path), shards=1, tenants=["acme"], agents=[("acme", "alice")])
    data = ("--data", str(tmp_path))
    (tmp_path / "notes.yaml").write_text(NOTES)
    async with Mesh(options) as mesh, connect(credentials=mesh.credential("acme", "alice").path) as memory:
        assert await command("set", str(tmp_path / "notes.yaml"), *data) == 0
        for number in range(150):
            await memory.set_context(f"n{number % 50}", type="note", attributes={"title": f"text {number}"})
            if number == 75:
                mesh.children["views"].send(signal.SIGKILL)
        (question,) = embedder(EMBEDDER).embed(["text 149"])

        async def is_found() -> bool:
            try:
                found = await memory.search_embedding(question, space="notes", k=1)
            except NotFound:
                return False  # its first vector makes the space
            return bool(found.hits) and found.hits[0].score > 0.999 and await has_all(memory)

        await until(is_found)
        assert await command("list", *data) == 0
        assert await command("remove", "notes", "--with-vectors", *data) == 0
        assert (await memory.search_embedding(question, space="notes", k=1)).hits == []
        assert await command("remove", "notes", *data) == 1
    said = capsys.readouterr()
    assert "hashing:64" in said.out
    assert "there is no view 'notes'" in said.err


async def has_all(memory: Memory) -> bool:
    return all([is_of(await vector_of(memory, f"n{number % 50}"), f"text {number}") for number in range(100, 150)])


POLICY = "{version: 1, rules: [{type: note, leaves: {attributes: [title], vectors: [titles, bodies]}}]}"


async def test_a_device_is_told_no_vector_of_what_may_not_leave_its_hub(hub: HubSite, tmp_path: Path) -> None:
    views = [
        View(name=space, tenant=TENANT, type="note", attributes=attributes, space=space, embedder=EMBEDDER)
        for space, attributes in (("titles", ["title"]), ("bodies", ["title", "body"]))
    ]
    async with asking(hub.options, "test") as operator:
        await kv.put(operator.inbox, subjects.POLICIES.name, "own", POLICY.encode())
        for view in views:
            await put_view(operator.inbox, view)

        async def are_kept() -> bool:
            seen: ViewsSeen = await operator.ask(subjects.VIEW_STATUS, subjects.view_status(), Status())
            return all(each.filled and not each.waiting for each in seen.views)

        async with hosted(Views(await hub.link("views"), site="hub")), alice_at(hub.server) as at_hub:
            for name in ("held", "asked"):
                await at_hub.set_context(name, type="note", attributes={"title": "PUBLIC", "body": "SECRET"})
            await until(are_kept)
            assert (await at_hub.get_context("held")).spaces == ["bodies", "titles"]
    want = Want(tenant=TENANT, entities=["held"])
    async with device(hub, tmp_path / "device", interest=Interest(wants=[want])) as node:
        await current(node)
        async with alice_at(node.server) as memory:
            for name in ("held", "asked"):
                told = await memory.get_context(name, include_vectors=True)
                assert (told.attributes, told.spaces) == ({"title": "PUBLIC"}, ["titles"])
                assert is_of((told.vectors or {})["titles"], "title: PUBLIC")
            with pytest.raises(NotFound, match="no vector space 'bodies'"):
                await memory.search_embedding([1.0] * 64, space="bodies", scope="here")
