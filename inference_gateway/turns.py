"""Threads for what takes long with a long prompt: reading a large body, tokenizing, making a grammar."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple
from weakref import WeakValueDictionary

import anyio

from inference_gateway.errors import Overloaded
from inference_gateway.metrics import Metrics

T = TypeVar("T")
Args = TypeVarTuple("Args")

THREADS = 2
# Of one user: turns that are taken or waited for, and bytes of bodies that are being read.
PENDING = 256
READING = 4 * 1024 * 1024


class Turns:
    """These threads serve nothing else, so however slow they are, log-ins and reads of the policy go on.

    No user has more than one of them at a time, nor more than ``PENDING`` turns, waited for or taken. For one event
    loop.
    """

    def __init__(self, metrics: Metrics, threads: int = THREADS):
        self._threads = anyio.CapacityLimiter(threads)
        self._of_users: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()
        self._pending: Counter[str] = Counter()
        self._reading: Counter[str] = Counter()
        self._metrics = metrics

    async def run(self, user_id: str, work: Callable[[*Args], T], *args: *Args) -> T:
        """What ``work`` returns or raises, in a thread, when it is this user's turn. Raises Overloaded."""
        mine = self._of_users.setdefault(user_id, anyio.Lock())
        with self._held(self._pending, user_id, 1, PENDING):
            async with mine:
                return await anyio.to_thread.run_sync(work, *args, limiter=self._threads)

    @contextmanager
    def reading(self, user_id: str, size: int) -> Iterator[None]:
        """While a body of ``size`` bytes is read and waits for its turn. Raises Overloaded if the user has others, and
        they would come to more than ``READING`` bytes together.
        """
        with self._held(self._reading, user_id, size, READING):
            yield

    @contextmanager
    def _held(self, held: Counter[str], user_id: str, amount: int, most: int) -> Iterator[None]:
        if held[user_id] and held[user_id] + amount > most:
            refusal = Overloaded("too many of your requests wait to be read; try again in a moment")
            self._metrics.refused(refusal)
            raise refusal
        held[user_id] += amount
        try:
            yield
        finally:
            held[user_id] -= amount
            if not held[user_id]:
                del held[user_id]
