"""How many requests are answered at once, how many wait; who comes besides is sent away."""

from __future__ import annotations

import asyncio


class Full(Exception):
    """All slots are taken and the queue is full."""


class Slots:
    """`parallel` requests at once and `queue` that wait for one of them to end, first come first
    served.
    """

    def __init__(self, parallel: int, queue: int) -> None:
        self.parallel, self.queue = parallel, queue
        self.running = self.waiting = 0
        self._free = asyncio.Semaphore(parallel)

    async def take(self) -> Slot:
        """A slot, waited for. Full: too many wait already."""
        if self._free.locked() and self.waiting >= self.queue:
            raise Full
        slot = Slot(self)
        await slot.take()
        return slot


class Slot:
    """A place among those that are answered, which may be given back for a while."""

    def __init__(self, slots: Slots) -> None:
        self._slots, self._taken = slots, False

    async def take(self) -> None:
        """Waits for a place; whoever is cancelled meanwhile leaves the queue."""
        self._slots.waiting += 1
        try:
            await self._slots._free.acquire()
        finally:
            self._slots.waiting -= 1
        self._slots.running += 1
        self._taken = True

    def give_back(self) -> None:
        """Frees the place, if it is taken."""
        if self._taken:
            self._taken = False
            self._slots.running -= 1
            self._slots._free.release()
