"""Shared memory for fleets of AI agents, on NATS.

    import mnemesh

    async with mnemesh.connect(credentials="mnemesh-data/credentials/demo.alice.json") as memory:
        await memory.set_context("bus:7", type="bus", attributes={"kv": 20})

`Memory` has one method an operation (`client.py`); what can go wrong is in `errors.py`; what replies hold in
`messages`.
"""

from mnemesh.client import Memory, connect
from mnemesh.errors import (
    BadRequest,
    Busy,
    Conflict,
    Denied,
    Internal,
    MnemeshError,
    NotFound,
    Stale,
    Timeout,
    TooLarge,
    Unavailable,
)
from mnemesh.messages import Consistency, Edge, Entity

__all__ = [
    "BadRequest",
    "Busy",
    "Conflict",
    "Consistency",
    "Denied",
    "Edge",
    "Entity",
    "Internal",
    "Memory",
    "MnemeshError",
    "NotFound",
    "Stale",
    "Timeout",
    "TooLarge",
    "Unavailable",
    "connect",
]
