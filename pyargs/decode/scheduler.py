"""Which request is answered next: they wait in a queue of each user, and the users take turns. No model in it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable


class Scheduler:
    """Requests, by their numbers, that wait for one of `room` places.

    A user's requests are taken in order of arrival. Users take turns: one who was served goes to the end of the queue. So a
    lone request waits for at most one turn of each other user, however many requests they have.
    """

    def __init__(self, room: int):
        self.room = room
        self.here: list[int] = []  # the requests that are being answered, by position
        self.reading: int | None = None  # the one that has a place already, while its prompt is read in parts
        self.read = self.end = 0  # how many of its tokens are read, and up to where they are to be read next
        self.queues: dict[str, deque[int]] = {}  # by user, the next one first

    @property
    def waiting(self) -> int:
        return sum(map(len, self.queues.values()))

    def add(self, number: int, user: str) -> None:
        """Adds a request."""
        self.queues.setdefault(user, deque()).append(number)

    @property
    def inside(self) -> list[int]:
        """The requests that have a place."""
        return [*self.here, *([] if self.reading is None else [self.reading])]

    @property
    def next(self) -> int | None:
        """The request whose turn it is; None where no request waits, or no place is free."""
        if not self.queues or len(self.inside) >= self.room:
            return None
        return next(iter(self.queues.values()))[0]

    def admit(
        self,
        fits: Callable[[int], bool] = lambda number: True,
        size: Callable[[int], int] = lambda number: 0,
        most: int | None = None,
    ) -> list[int]:
        """Fills free places; returns the requests that come in, which stand behind those that are here. If the next one does
        not fit, it and all behind it wait.

        size: the tokens of a request's prompt; most: of these in all. The turn of a longer prompt makes it the one that is
        `reading`: it comes in when its last part can be read, and is the first of those that do.
        """
        come, left = [], math.inf if most is None else most
        if self.reading is not None:
            if size(self.reading) - self.read > left:
                self.end = self.read - self.read % most + most
                return []
            left -= size(self.reading) - self.read
            come.append(self.reading)
            self.here.append(self.reading)
            self.reading = None
        while (number := self.next) is not None and fits(number) and size(number) <= left:
            left -= size(number)
            self.here.append(self._take())
            come.append(number)
        if left == most and number is not None and fits(number):
            self.reading, self.read, self.end = self._take(), 0, most
        return come

    def _take(self) -> int:
        user = next(iter(self.queues))
        queue = self.queues.pop(user)
        if len(queue) > 1:
            self.queues[user] = queue  # behind the others
        return queue.popleft()

    def leave(self, numbers) -> list[int]:
        """Removes requests, waiting or not. Returns the old positions of those that stay; the last ones fill the gaps."""
        gone = set(numbers)
        if self.reading in gone:
            self.reading = None
        for user, queue in list(self.queues.items()):
            if gone & set(queue):
                self.queues[user] = queue = deque(number for number in queue if number not in gone)
                if not queue:
                    del self.queues[user]
        order = list(range(len(self.here)))
        for position in reversed(range(len(order))):
            if self.here[position] in gone:
                order[position] = order[-1]
                order.pop()
        self.here = [self.here[position] for position in order]
        return order
