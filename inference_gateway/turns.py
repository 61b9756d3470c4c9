"""Threads for what takes long with a long prompt: reading a large body, tokenizing, making a grammar."""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple
from weakref import WeakValueDictionary

import anyio

T = TypeVar("T")
Args = TypeVarTuple("Args")

THREADS = 2


class Turns:
    """These threads serve nothing else, so however slow they are, log-ins and reads of the policy go on.

    No user has more than one of them at a time.
    """

    def __init__(self, threads: int = THREADS):
        self._threads = anyio.CapacityLimiter(threads)
        self._of_users: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()

    async def run(self, user_id: str, work: Callable[[*Args], T], *args: *Args) -> T:
        """What ``work`` returns or raises, in a thread, when it is this user's turn."""
        mine = self._of_users.setdefault(user_id, anyio.Lock())
        async with mine:
            return await anyio.to_thread.run_sync(work, *args, limiter=self._threads)
