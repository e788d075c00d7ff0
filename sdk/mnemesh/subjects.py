"""Subject builders and the operation table. Generated from `subjects.yaml`; do not edit."""

from __future__ import annotations

# fmt: off
from mnemesh import messages
from mnemesh.contract import AnyOperation, Bucket, Operation

CONTRACT = "a5493cec7e2a"
"""Hash of the contract that this code was generated from."""

SET_CONTEXT = Operation(
    name="set_context",
    owner="gateway",
    callers=("agent",),
    inboxes=("_INBOX_agent.<tenant>.<agent>",),
    subject="mnemesh.v1.memory.set_context.<tenant>.<agent>",
    served="mnemesh.v1.memory.set_context.<tenant>.<agent>",
    request=messages.SetContext,
    reply=messages.Written,
    budget_ms=5000,
    max_bytes=524288,
    idempotent="by_id",
    concurrency=4096,
    mailbox=8192,
)
UPSERT_EMBEDDING = Operation(
    name="upsert_embedding",
    owner="gateway",
    callers=("agent",),
    inboxes=("_INBOX_agent.<tenant>.<agent>",),
    subject="mnemesh.v1.memory.upsert_embedding.<tenant>.<agent>",
    served="mnemesh.v1.memory.upsert_embedding.<tenant>.<agent>",
    request=messages.UpsertEmbedding,
    reply=messages.Written,
    budget_ms=5000,
    max_bytes=524288,
    idempotent="by_id",
    concurrency=4096,
    mailbox=8192,
)
FORGET = Operation(
    name="forget",
    owner="gateway",
    callers=("agent",),
    inboxes=("_INBOX_agent.<tenant>.<agent>",),
    subject="mnemesh.v1.memory.forget.<tenant>.<agent>",
    served="mnemesh.v1.memory.forget.<tenant>.<agent>",
    request=messages.Forget,
    reply=messages.Written,
    budget_ms=5000,
    max_bytes=65536,
    idempotent="by_id",
    concurrency=1024,
    mailbox=4096,
)
INGEST = Operation(
    name="ingest",
    owner="gateway",
    callers=("agent",),
    inboxes=("_INBOX_agent.<tenant>.<agent>",),
    subject="mnemesh.v1.memory.ingest.<tenant>.<agent>",
    served="mnemesh.v1.memory.ingest.<tenant>.<agent>",
    request=messages.Ingest,
    reply=messages.Ingested,
    budget_ms=30000,
    max_bytes=8388608,
    idempotent="by_id",
    concurrency=16,
    mailbox=256,
)
DERIVE = Operation(
    name="derive",
    owner="gateway",
    callers=("views",),
    inboxes=("_INBOX_views_0",),
    subject="mnemesh.v1.view.derive.<tenant>.<view>",
    served="mnemesh.v1.view.derive.<tenant>.<view>",
    request=messages.Derive,
    reply=messages.Written,
    budget_ms=5000,
    max_bytes=524288,
    idempotent="by_id",
    concurrency=1024,
    mailbox=4096,
)
GET_CONTEXT = Operation(
    name="get_context",
    owner="shard",
    callers=("agent", "hub", "views",),
    inboxes=("_INBOX_agent.<tenant>.<agent>", "_INBOX_hub_0", "_INBOX_views_0",),
    subject="mnemesh.v1.memory.get_context.<tenant>.<agent>.<entity>",
    served="mnemesh.v1.shard.get.<site>.<partition>.<tenant>.<agent>.<entity>",
    request=messages.GetContext,
    reply=messages.Context,
    budget_ms=2000,
    max_bytes=65536,
    idempotent="always",
    concurrency=256,
    mailbox=8192,
)
TIMELINE = Operation(
    name="timeline",
    owner="shard",
    callers=("agent", "hub",),
    inboxes=("_INBOX_agent.<tenant>.<agent>", "_INBOX_hub_0",),
    subject="mnemesh.v1.memory.timeline.<tenant>.<agent>.<entity>",
    served="mnemesh.v1.shard.timeline.<site>.<partition>.<tenant>.<agent>.<entity>",
    request=messages.Timeline,
    reply=messages.TimelinePage,
    budget_ms=5000,
    max_bytes=65536,
    idempotent="always",
    concurrency=64,
    mailbox=2048,
)
SEARCH_EMBEDDING = Operation(
    name="search_embedding",
    owner="router",
    callers=("agent", "hub", "edge",),
    inboxes=("_INBOX_agent.<tenant>.<agent>", "_INBOX_hub_0", "_INBOX_edge.<site>",),
    subject="mnemesh.v1.memory.search_embedding.<tenant>.<agent>",
    served="mnemesh.v1.memory.search_embedding.<tenant>.<agent>",
    request=messages.SearchEmbedding,
    reply=messages.Hits,
    budget_ms=2000,
    max_bytes=524288,
    idempotent="always",
    concurrency=512,
    mailbox=4096,
)
SEARCH_TEXT = Operation(
    name="search_text",
    owner="router",
    callers=("agent", "hub", "edge",),
    inboxes=("_INBOX_agent.<tenant>.<agent>", "_INBOX_hub_0", "_INBOX_edge.<site>",),
    subject="mnemesh.v1.memory.search_text.<tenant>.<agent>",
    served="mnemesh.v1.memory.search_text.<tenant>.<agent>",
    request=messages.SearchText,
    reply=messages.Hits,
    budget_ms=2000,
    max_bytes=65536,
    idempotent="always",
    concurrency=512,
    mailbox=4096,
)
TRAVERSE = Operation(
    name="traverse",
    owner="router",
    callers=("agent", "hub", "edge",),
    inboxes=("_INBOX_agent.<tenant>.<agent>", "_INBOX_hub_0", "_INBOX_edge.<site>",),
    subject="mnemesh.v1.memory.traverse.<tenant>.<agent>",
    served="mnemesh.v1.memory.traverse.<tenant>.<agent>",
    request=messages.Traverse,
    reply=messages.Traversal,
    budget_ms=5000,
    max_bytes=524288,
    idempotent="always",
    concurrency=256,
    mailbox=4096,
)
TIMELINE_RANGE = Operation(
    name="timeline_range",
    owner="router",
    callers=("agent",),
    inboxes=("_INBOX_agent.<tenant>.<agent>",),
    subject="mnemesh.v1.memory.timeline_range.<tenant>.<agent>",
    served="mnemesh.v1.memory.timeline_range.<tenant>.<agent>",
    request=messages.TimelineRange,
    reply=messages.TimelinePage,
    budget_ms=5000,
    max_bytes=65536,
    idempotent="always",
    concurrency=64,
    mailbox=1024,
)
SHARD_SEARCH = Operation(
    name="shard_search",
    owner="shard",
    callers=("router",),
    inboxes=("_INBOX_router_0",),
    subject="mnemesh.v1.shard.search.<shard>.<tenant>.<agent>",
    served="mnemesh.v1.shard.search.<shard>.<tenant>.<agent>",
    request=messages.SearchEmbedding,
    reply=messages.Hits,
    budget_ms=2000,
    max_bytes=524288,
    idempotent="always",
    concurrency=512,
    mailbox=8192,
)
SHARD_SEARCH_TEXT = Operation(
    name="shard_search_text",
    owner="shard",
    callers=("router",),
    inboxes=("_INBOX_router_0",),
    subject="mnemesh.v1.shard.search_text.<shard>.<tenant>.<agent>",
    served="mnemesh.v1.shard.search_text.<shard>.<tenant>.<agent>",
    request=messages.SearchText,
    reply=messages.Hits,
    budget_ms=2000,
    max_bytes=65536,
    idempotent="always",
    concurrency=256,
    mailbox=8192,
)
SHARD_EXPAND = Operation(
    name="shard_expand",
    owner="shard",
    callers=("router",),
    inboxes=("_INBOX_router_0",),
    subject="mnemesh.v1.shard.expand.<shard>.<tenant>.<agent>",
    served="mnemesh.v1.shard.expand.<shard>.<tenant>.<agent>",
    request=messages.Expand,
    reply=messages.Expanded,
    budget_ms=5000,
    max_bytes=1048576,
    idempotent="always",
    concurrency=256,
    mailbox=8192,
)
SHARD_TIMELINE_RANGE = Operation(
    name="shard_timeline_range",
    owner="shard",
    callers=("router",),
    inboxes=("_INBOX_router_0",),
    subject="mnemesh.v1.shard.timeline_range.<shard>.<tenant>.<agent>",
    served="mnemesh.v1.shard.timeline_range.<shard>.<tenant>.<agent>",
    request=messages.TimelineRange,
    reply=messages.TimelinePage,
    budget_ms=5000,
    max_bytes=65536,
    idempotent="always",
    concurrency=64,
    mailbox=2048,
)
SHARD_STATUS = Operation(
    name="shard_status",
    owner="shard",
    callers=("operator", "hub",),
    inboxes=("_INBOX_operator_0", "_INBOX_hub_0",),
    subject="mnemesh.v1.shard.status.<shard>",
    served="mnemesh.v1.shard.status.<shard>",
    request=messages.Status,
    reply=messages.ShardStatus,
    budget_ms=60000,
    max_bytes=65536,
    idempotent="always",
    concurrency=2,
    mailbox=64,
)
SHARD_REBUILD = Operation(
    name="shard_rebuild",
    owner="shard",
    callers=("operator",),
    inboxes=("_INBOX_operator_0",),
    subject="mnemesh.v1.shard.rebuild.<shard>",
    served="mnemesh.v1.shard.rebuild.<shard>",
    request=messages.Rebuild,
    reply=messages.Rebuilding,
    budget_ms=5000,
    max_bytes=4096,
    idempotent="always",
    concurrency=1,
    mailbox=16,
)
TAKE_SNAPSHOT = Operation(
    name="take_snapshot",
    owner="shard",
    callers=("operator",),
    inboxes=("_INBOX_operator_0",),
    subject="mnemesh.v1.shard.take_snapshot.<shard>",
    served="mnemesh.v1.shard.take_snapshot.<shard>",
    request=messages.TakeSnapshot,
    reply=messages.Snapshot,
    budget_ms=600000,
    max_bytes=65536,
    idempotent="always",
    concurrency=1,
    mailbox=4,
)
LIST_SNAPSHOTS = Operation(
    name="list_snapshots",
    owner="shard",
    callers=("operator",),
    inboxes=("_INBOX_operator_0",),
    subject="mnemesh.v1.shard.list_snapshots.<shard>",
    served="mnemesh.v1.shard.list_snapshots.<shard>",
    request=messages.ListSnapshots,
    reply=messages.Snapshots,
    budget_ms=60000,
    max_bytes=65536,
    idempotent="always",
    concurrency=2,
    mailbox=64,
)
SHARD_LIST = Operation(
    name="shard_list",
    owner="shard",
    callers=("hub", "edge", "views",),
    inboxes=("_INBOX_hub_0", "_INBOX_edge.<site>", "_INBOX_views_0",),
    subject="mnemesh.v1.shard.list.<site>.<shard>.<tenant>.<agent>",
    served="mnemesh.v1.shard.list.<site>.<shard>.<tenant>.<agent>",
    request=messages.ListEntities,
    reply=messages.Entities,
    budget_ms=30000,
    max_bytes=65536,
    idempotent="always",
    concurrency=4,
    mailbox=256,
)
SHARD_DESCRIBE = Operation(
    name="shard_describe",
    owner="shard",
    callers=("hub", "edge", "views",),
    inboxes=("_INBOX_hub_0", "_INBOX_edge.<site>", "_INBOX_views_0",),
    subject="mnemesh.v1.shard.describe.<site>.<shard>.<tenant>.<agent>",
    served="mnemesh.v1.shard.describe.<site>.<shard>.<tenant>.<agent>",
    request=messages.Describe,
    reply=messages.Descriptions,
    budget_ms=5000,
    max_bytes=1048576,
    idempotent="always",
    concurrency=64,
    mailbox=1024,
)
SHARD_HELD = Operation(
    name="shard_held",
    owner="shard",
    callers=("edge",),
    inboxes=("_INBOX_edge.<site>",),
    subject="mnemesh.v1.shard.held.<site>.<shard>",
    served="mnemesh.v1.shard.held.<site>.<shard>",
    request=messages.AskHeld,
    reply=messages.Held,
    budget_ms=5000,
    max_bytes=65536,
    idempotent="always",
    concurrency=4,
    mailbox=64,
)
SHARD_ERASED = Operation(
    name="shard_erased",
    owner="shard",
    callers=("hub", "edge",),
    inboxes=("_INBOX_hub_0", "_INBOX_edge.<site>",),
    subject="mnemesh.v1.shard.erased.<site>.<shard>.<tenant>.<agent>",
    served="mnemesh.v1.shard.erased.<site>.<shard>.<tenant>.<agent>",
    request=messages.AskErased,
    reply=messages.Erased,
    budget_ms=30000,
    max_bytes=65536,
    idempotent="always",
    concurrency=16,
    mailbox=1024,
)
SHARD_FORGOTTEN = Operation(
    name="shard_forgotten",
    owner="shard",
    callers=("hub", "edge",),
    inboxes=("_INBOX_hub_0", "_INBOX_edge.<site>",),
    subject="mnemesh.v1.shard.forgotten.<site>.<shard>",
    served="mnemesh.v1.shard.forgotten.<site>.<shard>",
    request=messages.AskForgotten,
    reply=messages.Forgotten,
    budget_ms=30000,
    max_bytes=131072,
    idempotent="always",
    concurrency=16,
    mailbox=64,
)
VIEW_STATUS = Operation(
    name="view_status",
    owner="views",
    callers=("operator",),
    inboxes=("_INBOX_operator_0",),
    subject="mnemesh.v1.view.status",
    served="mnemesh.v1.view.status",
    request=messages.Status,
    reply=messages.ViewsSeen,
    budget_ms=5000,
    max_bytes=65536,
    idempotent="always",
    concurrency=4,
    mailbox=64,
)
UPLINK_POSITION = Operation(
    name="uplink_position",
    owner="hub",
    callers=("edge",),
    inboxes=("_R_",),
    subject="mnemesh.v1.edge.position.<site>",
    served="mnemesh.v1.edge.position.<site>",
    request=messages.AskPosition,
    reply=messages.Position,
    budget_ms=5000,
    max_bytes=65536,
    idempotent="always",
    concurrency=64,
    mailbox=1024,
    per_site=4,
)
UPLINK = Operation(
    name="uplink",
    owner="hub",
    callers=("edge",),
    inboxes=("_R_",),
    subject="mnemesh.v1.edge.uplink.<site>",
    served="mnemesh.v1.edge.uplink.<site>",
    request=messages.OwnEvents,
    reply=messages.Uplinked,
    budget_ms=5000,
    max_bytes=8388608,
    idempotent="by_id",
    concurrency=16,
    mailbox=1024,
    per_site=2,
)
OPEN_FEED = Operation(
    name="open_feed",
    owner="hub",
    callers=("edge",),
    inboxes=("_R_",),
    subject="mnemesh.v1.edge.open_feed.<site>",
    served="mnemesh.v1.edge.open_feed.<site>",
    request=messages.OpenFeed,
    reply=messages.FeedOpened,
    budget_ms=60000,
    max_bytes=8388608,
    idempotent="always",
    concurrency=64,
    mailbox=1024,
    per_site=4,
)
NEXT_FEED = Operation(
    name="next_feed",
    owner="hub",
    callers=("edge",),
    inboxes=("_R_",),
    subject="mnemesh.v1.edge.next_feed.<site>",
    served="mnemesh.v1.edge.next_feed.<site>",
    request=messages.NextFeed,
    reply=messages.FeedBatch,
    budget_ms=10000,
    max_bytes=65536,
    idempotent="always",
    concurrency=1024,
    mailbox=1024,
    per_site=4,
)
HUB_GET_CONTEXT = Operation(
    name="hub_get_context",
    owner="hub",
    callers=("edge",),
    inboxes=("_R_",),
    subject="mnemesh.v1.edge.get_context.<site>.<tenant>.<agent>",
    served="mnemesh.v1.edge.get_context.<site>.<tenant>.<agent>",
    request=messages.GetContext,
    reply=messages.Context,
    budget_ms=2000,
    max_bytes=65536,
    idempotent="always",
    concurrency=256,
    mailbox=4096,
    per_site=64,
)
HUB_TIMELINE = Operation(
    name="hub_timeline",
    owner="hub",
    callers=("edge",),
    inboxes=("_R_",),
    subject="mnemesh.v1.edge.timeline.<site>.<tenant>.<agent>",
    served="mnemesh.v1.edge.timeline.<site>.<tenant>.<agent>",
    request=messages.Timeline,
    reply=messages.TimelinePage,
    budget_ms=5000,
    max_bytes=65536,
    idempotent="always",
    concurrency=64,
    mailbox=1024,
    per_site=16,
)
HUB_SEARCH = Operation(
    name="hub_search",
    owner="hub",
    callers=("edge",),
    inboxes=("_R_",),
    subject="mnemesh.v1.edge.search.<site>.<tenant>.<agent>",
    served="mnemesh.v1.edge.search.<site>.<tenant>.<agent>",
    request=messages.SearchEmbedding,
    reply=messages.Hits,
    budget_ms=2000,
    max_bytes=524288,
    idempotent="always",
    concurrency=256,
    mailbox=4096,
    per_site=64,
)
HUB_SEARCH_TEXT = Operation(
    name="hub_search_text",
    owner="hub",
    callers=("edge",),
    inboxes=("_R_",),
    subject="mnemesh.v1.edge.search_text.<site>.<tenant>.<agent>",
    served="mnemesh.v1.edge.search_text.<site>.<tenant>.<agent>",
    request=messages.SearchText,
    reply=messages.Hits,
    budget_ms=2000,
    max_bytes=65536,
    idempotent="always",
    concurrency=256,
    mailbox=4096,
    per_site=64,
)
HUB_TRAVERSE = Operation(
    name="hub_traverse",
    owner="hub",
    callers=("edge",),
    inboxes=("_R_",),
    subject="mnemesh.v1.edge.traverse.<site>.<tenant>.<agent>",
    served="mnemesh.v1.edge.traverse.<site>.<tenant>.<agent>",
    request=messages.Traverse,
    reply=messages.Traversal,
    budget_ms=5000,
    max_bytes=524288,
    idempotent="always",
    concurrency=256,
    mailbox=4096,
    per_site=64,
)
DEVICE_SEARCH = Operation(
    name="device_search",
    owner="edge",
    callers=("router",),
    inboxes=("_R_",),
    subject="mnemesh.v1.device.search.<site>.<tenant>.<agent>",
    served="mnemesh.v1.device.search.<site>.<tenant>.<agent>",
    request=messages.SearchEmbedding,
    reply=messages.Hits,
    budget_ms=2000,
    max_bytes=524288,
    idempotent="always",
    concurrency=64,
    mailbox=1024,
)
DEVICE_SEARCH_TEXT = Operation(
    name="device_search_text",
    owner="edge",
    callers=("router",),
    inboxes=("_R_",),
    subject="mnemesh.v1.device.search_text.<site>.<tenant>.<agent>",
    served="mnemesh.v1.device.search_text.<site>.<tenant>.<agent>",
    request=messages.SearchText,
    reply=messages.Hits,
    budget_ms=2000,
    max_bytes=65536,
    idempotent="always",
    concurrency=64,
    mailbox=1024,
)
DEVICE_TRAVERSE = Operation(
    name="device_traverse",
    owner="edge",
    callers=("router",),
    inboxes=("_R_",),
    subject="mnemesh.v1.device.traverse.<site>.<tenant>.<agent>",
    served="mnemesh.v1.device.traverse.<site>.<tenant>.<agent>",
    request=messages.Traverse,
    reply=messages.Traversal,
    budget_ms=5000,
    max_bytes=524288,
    idempotent="always",
    concurrency=64,
    mailbox=1024,
)
CONFIRM_ERASED = Operation(
    name="confirm_erased",
    owner="hub",
    callers=("edge",),
    inboxes=("_R_",),
    subject="mnemesh.v1.edge.confirm_erased.<site>",
    served="mnemesh.v1.edge.confirm_erased.<site>",
    request=messages.ConfirmErased,
    reply=messages.Confirmed,
    budget_ms=5000,
    max_bytes=1048576,
    idempotent="always",
    concurrency=16,
    mailbox=256,
    per_site=2,
)
ERASURES = Operation(
    name="erasures",
    owner="hub",
    callers=("operator",),
    inboxes=("_INBOX_operator_0",),
    subject="mnemesh.v1.hub.erasures",
    served="mnemesh.v1.hub.erasures",
    request=messages.AskErasures,
    reply=messages.Erasures,
    budget_ms=30000,
    max_bytes=65536,
    idempotent="always",
    concurrency=4,
    mailbox=64,
)
DEVICES = Operation(
    name="devices",
    owner="hub",
    callers=("operator", "router",),
    inboxes=("_INBOX_operator_0", "_INBOX_router_0",),
    subject="mnemesh.v1.hub.devices",
    served="mnemesh.v1.hub.devices",
    request=messages.AskDevices,
    reply=messages.DevicesSeen,
    budget_ms=5000,
    max_bytes=65536,
    idempotent="always",
    concurrency=4,
    mailbox=64,
)
EDGE_STATUS = Operation(
    name="edge_status",
    owner="edge",
    callers=("operator",),
    inboxes=("_INBOX_operator_0",),
    subject="mnemesh.v1.edge.status.<site>",
    served="mnemesh.v1.edge.status.<site>",
    request=messages.Status,
    reply=messages.EdgeStatus,
    budget_ms=5000,
    max_bytes=65536,
    idempotent="always",
    concurrency=4,
    mailbox=64,
)

OPERATIONS: dict[str, AnyOperation] = {
    "set_context": SET_CONTEXT,
    "upsert_embedding": UPSERT_EMBEDDING,
    "forget": FORGET,
    "ingest": INGEST,
    "derive": DERIVE,
    "get_context": GET_CONTEXT,
    "timeline": TIMELINE,
    "search_embedding": SEARCH_EMBEDDING,
    "search_text": SEARCH_TEXT,
    "traverse": TRAVERSE,
    "timeline_range": TIMELINE_RANGE,
    "shard_search": SHARD_SEARCH,
    "shard_search_text": SHARD_SEARCH_TEXT,
    "shard_expand": SHARD_EXPAND,
    "shard_timeline_range": SHARD_TIMELINE_RANGE,
    "shard_status": SHARD_STATUS,
    "shard_rebuild": SHARD_REBUILD,
    "take_snapshot": TAKE_SNAPSHOT,
    "list_snapshots": LIST_SNAPSHOTS,
    "shard_list": SHARD_LIST,
    "shard_describe": SHARD_DESCRIBE,
    "shard_held": SHARD_HELD,
    "shard_erased": SHARD_ERASED,
    "shard_forgotten": SHARD_FORGOTTEN,
    "view_status": VIEW_STATUS,
    "uplink_position": UPLINK_POSITION,
    "uplink": UPLINK,
    "open_feed": OPEN_FEED,
    "next_feed": NEXT_FEED,
    "hub_get_context": HUB_GET_CONTEXT,
    "hub_timeline": HUB_TIMELINE,
    "hub_search": HUB_SEARCH,
    "hub_search_text": HUB_SEARCH_TEXT,
    "hub_traverse": HUB_TRAVERSE,
    "device_search": DEVICE_SEARCH,
    "device_search_text": DEVICE_SEARCH_TEXT,
    "device_traverse": DEVICE_TRAVERSE,
    "confirm_erased": CONFIRM_ERASED,
    "erasures": ERASURES,
    "devices": DEVICES,
    "edge_status": EDGE_STATUS,
}

TENANTS = Bucket(name="mnemesh_tenants", about="the tenants that exist")
SHARDS = Bucket(name="mnemesh_shards", about="the shard map, which shard serves which partitions")
SPACES = Bucket(name="mnemesh_spaces", about="the vector spaces with their dimension, metric, index and model")
POLICIES = Bucket(name="mnemesh_policies", about="what may leave, as set here or handed by the hub; its enrolment")
CONSISTENCY = Bucket(name="mnemesh_consistency", about="how fresh reads must be, as set here or handed by the hub")
SITES = Bucket(name="mnemesh_sites", about="the regions and tenants of this site and of its devices, revoked or not")
LEASES = Bucket(name="mnemesh_leases", about="which replica writes to shared stores, takes snapshots, keeps views")
GENERATIONS = Bucket(name="mnemesh_generations", about="how often a store that replicas share was built anew")
VIEWS = Bucket(name="mnemesh_views", about="the views, of which attributes of which entities there is a vector")
VIEW_PLACES = Bucket(name="mnemesh_view_places", about="up to where a view has the log")
RECEIPTS = Bucket(name="mnemesh_receipts", about="what was erased at this site and, at a hub, at its devices")

BUCKETS = (TENANTS, SHARDS, SPACES, POLICIES, CONSISTENCY, SITES, LEASES, GENERATIONS, VIEWS, VIEW_PLACES, RECEIPTS)

SNAPSHOTS = Bucket(name="mnemesh_snapshots", about="snapshots of the shards' embedded stores")

OBJECTS = (SNAPSHOTS,)


LOG_DUPLICATE_WINDOW_S = {"hub": 120, "device": 45}


def log_stream(site: str) -> str:
    """The stream."""
    return f"MEMORY_{site}"


LOG = "mnemesh.v1.log.>"


def log_event(origin: str, tenant: str, partition: int | str, entity: str) -> str:
    """Subject of events in the log."""
    return f"mnemesh.v1.log.{origin}.{tenant}.{partition}.{entity}"


def log_mark(origin: str) -> str:
    """Subject of marks in the log."""
    return f"mnemesh.v1.log.{origin}.mark"


def log_holding(origin: str, tenant: str, partition: int | str, entity: str) -> str:
    """Subject of holdings in the log."""
    return f"mnemesh.v1.log.{origin}.holding.{tenant}.{partition}.{entity}"


def agent_inbox(tenant: str, agent: str) -> str:
    """Inbox prefix of agent: a client that reasons and acts."""
    return f"_INBOX_agent.{tenant}.{agent}"


def agent_user(tenant: str, agent: str) -> str:
    """User name of agent."""
    return f"{tenant}.{agent}"


def gateway_inbox() -> str:
    """Inbox prefix of gateway: takes writes and commits them to the log."""
    return "_INBOX_gateway_0"


def gateway_user() -> str:
    """User name of gateway."""
    return "gateway"


def router_inbox() -> str:
    """Inbox prefix of router: answers questions that span shards."""
    return "_INBOX_router_0"


def router_user() -> str:
    """User name of router."""
    return "router"


def shard_inbox() -> str:
    """Inbox prefix of shard: serves some partitions from stores that follow the log."""
    return "_INBOX_shard_0"


def shard_user() -> str:
    """User name of shard."""
    return "shard"


def operator_inbox() -> str:
    """Inbox prefix of operator: provisions streams and watches the mesh."""
    return "_INBOX_operator_0"


def operator_user() -> str:
    """User name of operator."""
    return "operator"


def hub_inbox() -> str:
    """Inbox prefix of hub: what a hub does for its devices."""
    return "_INBOX_hub_0"


def hub_user() -> str:
    """User name of hub."""
    return "hub"


def views_inbox() -> str:
    """Inbox prefix of views: keeps the vectors that follow from attributes."""
    return "_INBOX_views_0"


def views_user() -> str:
    """User name of views."""
    return "views"


def edge_inbox(site: str) -> str:
    """Inbox prefix of edge: what a device does for its hub."""
    return f"_INBOX_edge.{site}"


def edge_user() -> str:
    """User name of edge."""
    return "edge"


def set_context(tenant: str, agent: str) -> str:
    """Patch one entity."""
    return f"mnemesh.v1.memory.set_context.{tenant}.{agent}"


def upsert_embedding(tenant: str, agent: str) -> str:
    """Set one vector of one entity."""
    return f"mnemesh.v1.memory.upsert_embedding.{tenant}.{agent}"


def forget(tenant: str, agent: str) -> str:
    """Erase one entity from the log and every store."""
    return f"mnemesh.v1.memory.forget.{tenant}.{agent}"


def ingest(tenant: str, agent: str) -> str:
    """Write many documents in one request, each on its own or all or nothing."""
    return f"mnemesh.v1.memory.ingest.{tenant}.{agent}"


def derive(tenant: str, view: str) -> str:
    """Set or remove the vector that a view has of one entity, as of one version of it."""
    return f"mnemesh.v1.view.derive.{tenant}.{view}"


def get_context(tenant: str, agent: str, entity: str) -> str:
    """Read one entity, now or as of a time."""
    return f"mnemesh.v1.memory.get_context.{tenant}.{agent}.{entity}"


def timeline(tenant: str, agent: str, entity: str) -> str:
    """The events of one entity in log order, resumable."""
    return f"mnemesh.v1.memory.timeline.{tenant}.{agent}.{entity}"


def search_embedding(tenant: str, agent: str) -> str:
    """The nearest vectors of a space over all shards."""
    return f"mnemesh.v1.memory.search_embedding.{tenant}.{agent}"


def search_text(tenant: str, agent: str) -> str:
    """The best matches of words over all shards, by BM25."""
    return f"mnemesh.v1.memory.search_text.{tenant}.{agent}"


def traverse(tenant: str, agent: str) -> str:
    """Walk the graph breadth first, across shards."""
    return f"mnemesh.v1.memory.traverse.{tenant}.{agent}"


def timeline_range(tenant: str, agent: str) -> str:
    """The events of a time range over all shards in log order, resumable."""
    return f"mnemesh.v1.memory.timeline_range.{tenant}.{agent}"


def shard_search(shard: str, tenant: str, agent: str) -> str:
    """Search_embedding on one shard."""
    return f"mnemesh.v1.shard.search.{shard}.{tenant}.{agent}"


def shard_search_text(shard: str, tenant: str, agent: str) -> str:
    """Search_text on one shard."""
    return f"mnemesh.v1.shard.search_text.{shard}.{tenant}.{agent}"


def shard_expand(shard: str, tenant: str, agent: str) -> str:
    """One hop of traverse on one shard, and what it can walk ahead."""
    return f"mnemesh.v1.shard.expand.{shard}.{tenant}.{agent}"


def shard_timeline_range(shard: str, tenant: str, agent: str) -> str:
    """Timeline_range on one shard."""
    return f"mnemesh.v1.shard.timeline_range.{shard}.{tenant}.{agent}"


def shard_status(shard: str) -> str:
    """Where one replica of a shard stands."""
    return f"mnemesh.v1.shard.status.{shard}"


def shard_rebuild(shard: str) -> str:
    """Have a replica build one of its stores anew from the log, while it is read."""
    return f"mnemesh.v1.shard.rebuild.{shard}"


def take_snapshot(shard: str) -> str:
    """Take a snapshot of one shard's embedded stores, now."""
    return f"mnemesh.v1.shard.take_snapshot.{shard}"


def list_snapshots(shard: str) -> str:
    """The snapshots that there are of one shard."""
    return f"mnemesh.v1.shard.list_snapshots.{shard}"


def shard_list(site: str, shard: str, tenant: str, agent: str) -> str:
    """The entities of one shard, by type or only those that are held for a device, in pages."""
    return f"mnemesh.v1.shard.list.{site}.{shard}.{tenant}.{agent}"


def shard_describe(site: str, shard: str, tenant: str, agent: str) -> str:
    """The types of some entities of one shard, and the sites that wrote them."""
    return f"mnemesh.v1.shard.describe.{site}.{shard}.{tenant}.{agent}"


def shard_held(site: str, shard: str) -> str:
    """How much one shard holds for its device."""
    return f"mnemesh.v1.shard.held.{site}.{shard}"


def shard_erased(site: str, shard: str, tenant: str, agent: str) -> str:
    """What is left of an entity after forgets, once a replica has applied them."""
    return f"mnemesh.v1.shard.erased.{site}.{shard}.{tenant}.{agent}"


def shard_forgotten(site: str, shard: str) -> str:
    """Which messages of a site's log are forgets, or came after the forget that wins over them."""
    return f"mnemesh.v1.shard.forgotten.{site}.{shard}"


def view_status() -> str:
    """Where each view stands."""
    return "mnemesh.v1.view.status"


def uplink_position(site: str) -> str:
    """Up to where the hub has a device's log."""
    return f"mnemesh.v1.edge.position.{site}"


def uplink(site: str) -> str:
    """A device's own events, in their order, for its hub's log."""
    return f"mnemesh.v1.edge.uplink.{site}"


def open_feed(site: str) -> str:
    """A device says what it wants to hold, and what it holds by now."""
    return f"mnemesh.v1.edge.open_feed.{site}"


def next_feed(site: str) -> str:
    """What comes next of all that a device wants; waits for it."""
    return f"mnemesh.v1.edge.next_feed.{site}"


def hub_get_context(site: str, tenant: str, agent: str) -> str:
    """Get_context at the hub, for a device that does not hold the entity."""
    return f"mnemesh.v1.edge.get_context.{site}.{tenant}.{agent}"


def hub_timeline(site: str, tenant: str, agent: str) -> str:
    """Timeline at the hub, for a device that does not hold the entity."""
    return f"mnemesh.v1.edge.timeline.{site}.{tenant}.{agent}"


def hub_search(site: str, tenant: str, agent: str) -> str:
    """Search_embedding over the hub's own shards, for a device."""
    return f"mnemesh.v1.edge.search.{site}.{tenant}.{agent}"


def hub_search_text(site: str, tenant: str, agent: str) -> str:
    """Search_text over the hub's own shards, for a device."""
    return f"mnemesh.v1.edge.search_text.{site}.{tenant}.{agent}"


def hub_traverse(site: str, tenant: str, agent: str) -> str:
    """Traverse over the hub's own shards, for a device."""
    return f"mnemesh.v1.edge.traverse.{site}.{tenant}.{agent}"


def device_search(site: str, tenant: str, agent: str) -> str:
    """Search_embedding over what a device has, as far as its policy lets it out."""
    return f"mnemesh.v1.device.search.{site}.{tenant}.{agent}"


def device_search_text(site: str, tenant: str, agent: str) -> str:
    """Search_text over what a device has, as far as its policy lets it out."""
    return f"mnemesh.v1.device.search_text.{site}.{tenant}.{agent}"


def device_traverse(site: str, tenant: str, agent: str) -> str:
    """Traverse over what a device has, as far as its policy lets it out."""
    return f"mnemesh.v1.device.traverse.{site}.{tenant}.{agent}"


def confirm_erased(site: str) -> str:
    """A device says what it erased."""
    return f"mnemesh.v1.edge.confirm_erased.{site}"


def erasures() -> str:
    """What was forgotten, who has erased it, and who has still to."""
    return "mnemesh.v1.hub.erasures"


def devices() -> str:
    """What a hub has heard of its devices."""
    return "mnemesh.v1.hub.devices"


def edge_status(site: str) -> str:
    """Where a device stands with its hub."""
    return f"mnemesh.v1.edge.status.{site}"
