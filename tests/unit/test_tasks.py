"""What must not be left half done is waited for, whoever cancels."""

from __future__ import annotations

import asyncio

import pytest

from tokenmesh.tasks import to_the_end


async def test_a_result_and_an_error_come_through() -> None:
    async def works() -> int:
        return 3

    async def fails() -> None:
        raise ValueError("no")

    assert await to_the_end(works()) == 3
    with pytest.raises(ValueError, match="no"):
        await to_the_end(fails())


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancellation_comes_after_the_end(times: int) -> None:
    # 1. Work is under way when its caller is cancelled, perhaps more than once.
    begun, may_end, told = asyncio.Event(), asyncio.Event(), []

    async def work() -> None:
        begun.set()
        await may_end.wait()
        told.append("ended")

    async def caller() -> None:
        try:
            await to_the_end(work())
        finally:
            told.append("cancelled")

    task = asyncio.create_task(caller())
    await begun.wait()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    # 2. It goes on, and only after its end does the caller hear of it.
    assert told == []
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == ["ended", "cancelled"]
