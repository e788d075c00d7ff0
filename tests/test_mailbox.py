"""The mailbox: of one sender no more than its share is at work or waits, whatever room there is."""

from __future__ import annotations

import asyncio

from mnemesh.mailbox import Mailbox


async def test_a_sender_that_has_its_share_keeps_nobody_else_out() -> None:
    done: list[str] = []
    go_on = asyncio.Event()

    async def work(item: str) -> None:
        await go_on.wait()
        done.append(item)

    async with asyncio.TaskGroup() as tasks:
        mailbox: Mailbox[str] = Mailbox(work, capacity=4, concurrency=1, share=2, tasks=tasks)
        taken = [mailbox.offer(f"a{number}", "a") for number in range(4)]
        assert taken == [True, True, False, False]
        assert [mailbox.offer(item, item[0]) for item in ("b0", "c0", "d0", "e0")] == [True, True, True, False]
        go_on.set()
        await mailbox.finished()
    assert done == ["a0", "a1", "b0", "c0", "d0"]
    async with asyncio.TaskGroup() as tasks:
        mailbox = Mailbox(work, capacity=4, concurrency=1, share=1, tasks=tasks)
        for number in range(3):
            assert mailbox.offer(f"again{number}", "a")
            await mailbox.finished()
