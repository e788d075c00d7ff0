"""Walking the graph across shards: breadth first, one exchange of frontiers with the shards a hop.

An edge lives in the partition of the entity that holds it. So outward hops ask each shard for the part of the frontier
that it has, and inward hops ask every shard, since the holders may be anywhere. Asked for an outward hop, a shard walks
on among its own entities and sends those edges too: a later hop takes from them what it needs, and asks only for the
rest. A node is expanded once, so cycles end.

Other sites are asked about what the caller named, and about what was reached over edges that they may know of. Where
that was not all, the walk is `restricted`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from mnemesh import messages, subjects
from mnemesh.call import Call
from mnemesh.errors import MnemeshError
from mnemesh.messages import Node, SiteCoverage, Token, Traverse
from router.peers import Edge, Peers, edge_to
from router.portions import bytes_of, portions
from router.scatter import Gathered, Scatter, coverage, lowest, raise_if_nothing
from router.shard_map import ShardMap

MOST_IN_EXPAND = 2000
MOST_BYTES_IN_EXPAND = 500_000
"""Ids in one request to a shard, and their bytes; a wider frontier goes in several rounds."""


class Walk:
    """One traversal."""

    def __init__(self, scatter: Scatter, shard_map: ShardMap, peers: Peers, request: Traverse, call: Call) -> None:
        self._scatter = scatter
        self._map = shard_map
        self._peers = peers
        self._request = request
        self._call = call
        self._nodes: dict[str, Node] = {}
        self._ahead: dict[str, list[Edge]] = {}
        """The edges of entities that a shard has walked ahead to."""
        self._truncated = False
        self._errors: dict[str, MnemeshError] = {}
        self._sites: dict[str, SiteCoverage] = {}
        """What other sites said of their part. Whoever did not answer is not asked again."""
        self._lacking: set[str] = set()
        """Entities of which this device's hub may know more."""
        self._askable: set[str] = set()
        """Entities that other sites may be asked about."""
        self._restricted = False
        self._watermark: Token = {}
        self._latest = 0

    async def run(self) -> messages.Traversal:
        """Walk to the depth or to the limit. Raises what the shards said if none of them answered the first hop."""
        request = self._request
        starts = [request.start] if isinstance(request.start, str) else request.start
        for start in starts:
            if len(self._nodes) < request.limit:
                self._nodes[start] = Node(entity_id=start, depth=0)
        self._truncated = not self._nodes.keys() >= set(starts)
        frontier = list(self._nodes)
        self._askable.update(frontier)
        for depth in range(1, request.depth + 1):
            if not frontier:
                break
            frontier = await self._hop(frontier, depth)
        return messages.Traversal(
            nodes=list(self._nodes.values()),
            truncated=self._truncated,
            watermark=self._watermark,
            latest=self._latest,
            coverage=coverage(self._map.shards, self._errors, list(self._sites.values())),
            restricted=self._restricted,
        )

    async def _hop(self, frontier: Sequence[str], depth: int) -> list[str]:
        reached: dict[str, Node] = {}
        edges = [edge for entity_id in frontier for edge in self._ahead.get(entity_id, ())]
        for ids in _rounds([entity_id for entity_id in frontier if entity_id not in self._ahead]):
            gathered = await self._expand(ids, self._request.depth - depth)
            if depth == 1:
                raise_if_nothing(gathered)
            self._errors |= gathered.errors
            seen = lowest(gathered.replies)
            self._watermark = seen | {
                site: min(sequence, seen.get(site, sequence)) for site, sequence in self._watermark.items()
            }
            for reply in gathered.replies.values():
                self._truncated |= reply.truncated
                self._latest = max(self._latest, reply.latest)
                ahead: dict[str, list[Edge]] = {entity_id: [] for entity_id in reply.ahead}
                for edge in reply.edges:
                    ahead.get(edge[0], edges).append(edge)
                self._ahead |= ahead
                self._lacking.update(reply.lacking)
        told = await self._elsewhere(frontier)
        if depth < self._request.depth:
            await self._note_askable(edges, told)
        edges += told
        for near, relation, far in sorted(edges):
            if far not in self._nodes and far not in reached:
                reached[far] = Node(entity_id=far, depth=depth, via=near, relation=relation)
        room = self._request.limit - len(self._nodes)
        if len(reached) > room:
            self._truncated = True
            reached = dict(list(reached.items())[:room])
        self._nodes |= reached
        return list(reached)

    async def _elsewhere(self, frontier: Sequence[str]) -> list[Edge]:
        """The edges of these ids that other sites know. A hub is asked for what is not held here, a device for all."""
        request = self._request
        if request.scope == "here":
            return []
        wanted = frontier
        if self._peers.hold_the_rest and request.direction == "out":
            wanted = [entity_id for entity_id in frontier if entity_id in self._lacking]
        starts = [entity_id for entity_id in wanted if entity_id in self._askable]
        self._restricted |= len(starts) < len(wanted)
        if not starts:
            return []
        asked = replace(request, start=starts, depth=1)
        edges: list[Edge] = []
        lost = {site for site, said in self._sites.items() if said.state != "answered"}
        for answer in await self._peers.ask("traverse", asked, self._call, without=lost):
            said = answer.coverage
            before = self._sites.get(said.site)
            self._sites[said.site] = said if before is None else _of_both(before, said)
            if answer.reply is not None:
                self._truncated |= answer.reply.truncated
                edges += [edge for node in answer.reply.nodes if (edge := edge_to(node)) is not None]
        return edges

    async def _note_askable(self, here: Sequence[Edge], told: Sequence[Edge]) -> None:
        """Note which entities that a hop reaches others may be asked about, by the edges `here` and those `told` there.

        A hub knows what it told; of a device's edges other devices are to know no more than of those here.
        """
        if self._request.scope == "here":
            return
        if self._peers.hold_the_rest:
            self._askable.update(far for _, _, far in told)
        else:
            here = [*here, *told]
        onward = [edge for edge in here if edge[0] in self._askable and edge[2] not in self._askable]
        if onward:
            known = await self._peers.may_know(onward, self._latest, self._call)
            self._askable.update(far for _, _, far in known)

    async def _expand(self, ids: Sequence[str], ahead: int) -> Gathered:
        """The edges of these ids, from the shards that may have them, and of what lies up to `ahead` hops beyond."""
        request = self._request
        shards = self._map.shards
        caller = self._call.caller
        parts: dict[str, list[str]] = {name: [] for name in shards}
        if request.direction == "out":
            for entity_id in ids:
                owner = self._map.owner_of(caller.tenant, entity_id)
                if owner is not None:
                    parts[owner].append(entity_id)
        else:
            parts = {name: list(ids) for name in shards}
        return await self._scatter.ask(
            subjects.SHARD_EXPAND,
            {
                name: (
                    subjects.shard_expand(name, caller.tenant, caller.agent),
                    messages.Expand(
                        entity_ids=part,
                        relations=request.relations,
                        direction=request.direction,
                        ahead=ahead,
                        consistency=request.consistency,
                    ),
                )
                for name, part in parts.items()
                if part
            },
            shards,
            self._call,
        )


def _of_both(before: SiteCoverage, after: SiteCoverage) -> SiteCoverage:
    """What a site covers that answered a hop and was asked about a later one."""
    if after.state != "answered":
        return after
    return replace(
        after,
        watermark=lowest({"before": before, "after": after}),
        restricted=before.restricted or after.restricted,
        complete=before.complete and after.complete,
        code=before.code or after.code,
    )


def _rounds(frontier: Sequence[str]) -> Iterator[Sequence[str]]:
    """The frontier in parts that fit a request."""
    return portions(frontier, most=MOST_IN_EXPAND, most_bytes=MOST_BYTES_IN_EXPAND, size_of=bytes_of)
