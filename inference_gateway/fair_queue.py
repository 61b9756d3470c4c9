"""The engine's places, shared fairly among users: whoever has had the fewest tokens is next (Virtual Token Counter).

Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2, with one counter per user and
a weight of 1 for every token. A user who comes back does not bring the credit of the time away.
"""

import asyncio
from collections import Counter, deque
from dataclasses import dataclass

from inference_gateway.errors import Overloaded, QueueTimeout


@dataclass(eq=False)
class Waiter:
    """A request for one answer, without its place yet."""

    user_id: str
    tokens: int
    arrival: int
    admitted: asyncio.Future[None]


class FairQueue:
    """``places`` to hand out and at most ``max_waiting`` requests without one. For one event loop.

    When it is full, a newcomer takes the place in line of the longest line's last request, if that line stays at
    least as long as the newcomer's own: nobody can fill the queue for the others.

    No place is ever taken from an answer, so a user gets ``per_user`` of them at most (all, unless said otherwise) and
    waits even while others are free: with fewer than all, nobody can hold every place for as long as an answer takes.
    """

    def __init__(self, places: int, max_waiting: int, per_user: int | None = None):
        self.places = places
        self._per_user = places if per_user is None else per_user
        self._max_waiting = max_waiting
        self._free = places
        self._held: Counter[str] = Counter()
        self._lines: dict[str, deque[Waiter]] = {}
        self._served: dict[str, int] = {}  # tokens by user
        self._floor = 0
        self._arrivals = 0

    @property
    def running(self) -> int:
        """Places in use."""
        return self.places - self._free

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(len(line) for line in self._lines.values())

    async def enter(
        self, user_id: str, tokens: int, timeout: float, waiting: set[asyncio.Timeout] | None = None
    ) -> None:
        """Wait for a place. ``tokens``: what the user is charged on getting it. Raises Overloaded and QueueTimeout.

        ``waiting`` holds the timeout as long as it runs, for whoever may move it.
        """
        waiting = set() if waiting is None else waiting
        began = asyncio.get_running_loop().time()
        waiter = self._line_up(user_id, tokens)
        self._hand_out()
        if not waiter.admitted.done():
            self._check_room(waiter)
        patience = asyncio.timeout_at(began + timeout)
        try:
            async with patience:
                waiting.add(patience)
                await waiter.admitted
        except TimeoutError:
            self._withdraw(waiter)
            seconds = round((patience.when() or began) - began, 3)
            raise QueueTimeout(f"no place became free within {seconds:g} s; try again later") from None
        except BaseException:
            self._withdraw(waiter)
            raise
        finally:
            waiting.discard(patience)

    def leave(self, user_id: str) -> None:
        """Give a place back."""
        self._free += 1
        self._held[user_id] -= 1
        self._hand_out()
        self._forget(user_id)

    def count(self, user_id: str, tokens: int) -> None:
        """The user has had ``tokens`` more."""
        self._served[user_id] = self._served.get(user_id, 0) + tokens

    def _line_up(self, user_id: str, tokens: int) -> Waiter:
        self._arrivals += 1
        waiter = Waiter(user_id, tokens, self._arrivals, asyncio.get_running_loop().create_future())
        if user_id not in self._lines:
            lowest = min((self._served[user] for user in self._lines), default=self._floor)
            self._served[user_id] = max(self._served.get(user_id, 0), lowest)
            self._lines[user_id] = deque()
        self._lines[user_id].append(waiter)
        return waiter

    def _hand_out(self) -> None:
        while self._free and (entitled := [user for user in self._lines if self._held[user] < self._per_user]):
            user_id = min(entitled, key=self._turn)
            waiter = self._lines[user_id][0]
            if waiter.admitted.done():  # it was cancelled and has not noticed yet
                self._step_out(waiter)
                continue
            self._step_out(waiter)
            self._floor = max(self._floor, self._served[user_id])
            self._free -= 1
            self._held[user_id] += 1
            self.count(user_id, waiter.tokens)
            waiter.admitted.set_result(None)

    def _turn(self, user_id: str) -> tuple[int, int, int]:
        return self._served[user_id], self._held[user_id], self._lines[user_id][0].arrival

    def _check_room(self, waiter: Waiter) -> None:
        if self.waiting <= self._max_waiting:
            return
        mine = len(self._lines[waiter.user_id])
        longest = max(self._lines.values(), key=len)
        victim = waiter if len(longest) <= mine else longest[-1]
        self._step_out(victim)
        if not victim.admitted.done():
            victim.admitted.set_exception(Overloaded("too many requests are waiting; try again in a moment"))

    def _withdraw(self, waiter: Waiter) -> None:
        """The request does not go on; it may have been given its place in the same instant."""
        if waiter in self._lines.get(waiter.user_id, ()):
            self._step_out(waiter)
        elif waiter.admitted.done() and not waiter.admitted.cancelled() and waiter.admitted.exception() is None:
            self.leave(waiter.user_id)
        self._forget(waiter.user_id)

    def _step_out(self, waiter: Waiter) -> None:
        line = self._lines[waiter.user_id]
        line.remove(waiter)
        if not line:
            del self._lines[waiter.user_id]

    def _forget(self, user_id: str) -> None:
        if user_id in self._lines or self._held[user_id]:
            return
        del self._held[user_id]
        if self._served.get(user_id, 0) <= self._floor:
            self._served.pop(user_id, None)
