"""What one site tells another that asks: its own router's answer, cut down to what its policy lets out.

A device answers its hub so, and a hub its devices. Types decide, so they are looked up for whatever was found. Errors
are told by their code alone, for their words may quote what is kept back. Looks at `site_policy`, `sovereignty`,
`router` and `mnemesh`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from msgspec.structs import replace

from mnemesh import subjects
from mnemesh.asker import Asker
from mnemesh.call import Call
from mnemesh.contract import Operation, R
from mnemesh.errors import BY_CODE, Denied, MnemeshError
from mnemesh.messages import Context, Description, Hit, Hits, Node, SearchEmbedding, SearchText, Traversal, Traverse
from router.inventory import Inventory
from router.peers import Edge, edge_to
from services.site_policy import SitePolicy
from services.sovereignty import NOTHING, Leaves, allows_search, reduced_context, reduced_hit

MOST_HITS = 1000
MOST_NODES = 20_000
"""Nodes of a walk that are looked at, unless more are asked for: their reply fits a message with ids of 150 bytes."""

WIDENED = 4
"""How many times as many hits or nodes are asked for where too few of them may leave."""


class Disclosure:
    """Asks the router of its own site, and lets out what may leave."""

    def __init__(
        self,
        asker: Asker,
        inventory: Inventory,
        policy: SitePolicy,
        *,
        made_of: Callable[[str, str], Collection[str]] = lambda tenant, space: (),
    ) -> None:
        """`made_of` tells of which attributes the vectors of a tenant's space are made by this site."""
        self._asker = asker
        self._inventory = inventory
        self._policy = policy
        self._made_of = made_of

    async def search(self, request: SearchEmbedding, call: Call) -> Hits:
        return await self._search(
            subjects.SEARCH_EMBEDDING, subjects.search_embedding, request, call, list(request.filter), request.space
        )

    async def search_text(self, request: SearchText, call: Call) -> Hits:
        return await self._search(subjects.SEARCH_TEXT, subjects.search_text, request, call, [], None)

    async def traverse(self, request: Traverse, call: Call) -> Traversal:
        """An edge leaves where both of its ends let its relation out, for it tells of both.

        As many nodes as asked for of those that may leave, and `truncated` where there are more of them: what is kept
        back is neither counted nor told by that, but in a walk of more than is looked at.
        """
        tenant = self._admitted(call)
        if not self.restricts(tenant):
            return await self._ask(subjects.TRAVERSE, subjects.traverse, replace(request, scope="here"), call)
        most = max(request.limit, min(MOST_NODES, request.limit * WIDENED))
        while True:
            asked = replace(request, scope="here", limit=most)
            walked = await self._ask(subjects.TRAVERSE, subjects.traverse, asked, call)
            nodes = await self._kept_nodes(tenant, walked)
            if len(nodes) > request.limit or not walked.truncated or most >= MOST_NODES:
                truncated = len(nodes) > request.limit or walked.truncated
                return replace(walked, nodes=nodes[: request.limit], truncated=truncated, restricted=True)
            most = min(MOST_NODES, most * WIDENED)

    async def _kept_nodes(self, tenant: str, walked: Traversal) -> list[Node]:
        edges = [edge for node in walked.nodes if (edge := edge_to(node)) is not None]
        told = await self.edges(tenant, edges, walked.latest)
        kept: set[str] = set()
        nodes = []
        for node in walked.nodes:  # nearest first, so who reached a node comes before it
            if node.via is None or (node.via in kept and edge_to(node) in told):
                kept.add(node.entity_id)
                nodes.append(node)
        return nodes

    async def edges(self, tenant: str, edges: Sequence[Edge], upto: int) -> set[Edge]:
        """Those of some edges that may leave."""
        ends = {end for near, _, far in edges for end in (near, far)}
        leaves = await self.leaves(tenant, ends, upto)
        return {
            (near, relation, far)
            for near, relation, far in edges
            if leaves[near].tells_edges(relation) and leaves[far].tells_edges(relation)
        }

    async def context(self, context: Context, call: Call) -> Context:
        """A context that was read here, as it may leave. Raises `Denied` if it may not."""
        tenant = self._admitted(call)
        if not self.restricts(tenant):
            return context
        leaves = await self.leaves(tenant, [context.entity_id], context.latest)
        reduced = reduced_context(context, leaves[context.entity_id])
        if reduced is None:
            raise Denied(f"the policy of {self._policy.site} keeps this back")
        return reduced

    def restricts(self, tenant: str) -> bool:
        """Whether anything of a tenant may be kept back here."""
        return self._policy.restricts(tenant)

    async def leaves(self, tenant: str, entity_ids: Iterable[str], upto: int) -> dict[str, Leaves]:
        """What may leave of each entity, wherever it was written."""
        described = await self._inventory.describe(tenant, list(entity_ids), upto=upto)
        return {entity_id: self._leaves(tenant, told) for entity_id, told in described.items()}

    async def tells_forgotten(self, tenant: str, entity_id: str, upto: int) -> bool:
        """Whether others may hear that an entity was forgotten here: if they wrote it too, they know of it."""
        told = (await self._inventory.describe(tenant, [entity_id], upto=upto))[entity_id]
        return self._leaves(tenant, told).tells_fields or any(site != self._policy.site for site in told.sites)

    async def _leaves_of_found(self, tenant: str, entity_ids: Sequence[str], upto: int) -> dict[str, Leaves]:
        """The same of what a search found; nothing of what is not there any more, for nobody can say what it was."""
        described = await self._inventory.describe(tenant, entity_ids, upto=upto)
        return {
            entity_id: self._leaves(tenant, told) if told.sites else NOTHING for entity_id, told in described.items()
        }

    def _leaves(self, tenant: str, entity: Description) -> Leaves:
        leaves = self._policy.leaves_of(tenant, entity.types, (*entity.sites, self._policy.site))
        return leaves.without_made(partial(self._made_of, tenant))

    def _admitted(self, call: Call) -> str:
        """The caller's tenant. Raises `Denied` where nothing at all of it may leave."""
        tenant = call.caller.tenant
        site = self._policy.site
        if any(self._policy.policy.refuses(tenant, region) for region in self._policy.regions_of(site)):
            raise Denied(f"the policy of {site} keeps this back")
        return tenant

    async def _search(
        self,
        operation: Operation[Any, Hits],
        subject: Callable[[str, str], str],
        request: Any,
        call: Call,
        filtered: list[str],
        space: str | None,
    ) -> Hits:
        """As many hits as asked for of those that may leave: more are looked at as long as too few may."""
        tenant = self._admitted(call)
        if not self.restricts(tenant):
            return await self._ask(operation, subject, replace(request, scope="here"), call)
        most = min(MOST_HITS, request.k * WIDENED)
        while True:
            found = await self._ask(operation, subject, replace(request, scope="here", k=most), call)
            ids = [hit.entity_id for hit in found.hits]
            leaves = await self._leaves_of_found(tenant, ids, found.latest) if ids else {}
            hits = _kept(found.hits, leaves, request.type, filtered, space)
            if len(hits) >= request.k or len(ids) < most or most == MOST_HITS:
                return replace(found, hits=hits[: request.k], restricted=True)
            most = min(MOST_HITS, most * WIDENED)

    async def _ask(
        self, operation: Operation[Any, R], subject: Callable[[str, str], str], request: object, call: Call
    ) -> R:
        try:
            return await self._asker.ask(operation, subject(call.caller.tenant, call.caller.agent), request)
        except MnemeshError as error:
            raise self.told(error) from error

    def told(self, error: MnemeshError) -> MnemeshError:
        """An error as another site may hear of it."""
        return BY_CODE[error.code](f"{self._policy.site} cannot answer", retry_after_ms=error.retry_after_ms)


def _kept(
    hits: Iterable[Hit], leaves: Mapping[str, Leaves], kind: str | None, filtered: list[str], space: str | None
) -> list[Hit]:
    """The hits that may leave, as they may."""
    kept = []
    for hit in hits:
        may = leaves[hit.entity_id]
        if allows_search(may, kind, filtered) and (reduced := reduced_hit(hit, may, space)) is not None:
            kept.append(reduced)
    return kept
