"""Keeping a site's nats-server alive, whatever ends it."""

from __future__ import annotations

import asyncio
import logging
import shutil

from cli.server import NO_ROOM, NatsServer, NatsServerError, monitoring

logger = logging.getLogger("mnemesh.keeping")

FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 5.0
HEALTH_S = 2.0
ROOM = 64 * 1024 * 1024
"""Free bytes from which a disk counts as no longer full."""


async def keep(server: NatsServer) -> None:
    """Start it again whenever it ends; also where a start fails, for it may have been killed meanwhile."""
    backoff = FIRST_BACKOFF_S
    while True:
        status = await server.wait()
        logger.warning("nats-server ended with status %d; it starts again (%s)", status, server.log_file)
        await server.kill()
        try:
            await server.start()
        except NatsServerError as error:
            logger.warning("nats-server did not start: %s", error)
            await asyncio.sleep(backoff)
            backoff = min(LONGEST_BACKOFF_S, backoff * 2)
        else:
            backoff = FIRST_BACKOFF_S


async def heal(server: NatsServer) -> None:
    """Once there is room again, start a server anew whose log met a full disk: it takes no writes before."""
    options = server.options
    while True:
        await asyncio.sleep(HEALTH_S)
        ill = (await monitoring(options, "/healthz")).get("error", "")
        if NO_ROOM in ill and shutil.disk_usage(options.data).free >= ROOM and server.pid is not None:
            logger.warning("there is room again; nats-server starts anew: %s", ill)
            server.terminate()
