"""Which request is answered next: they wait in a queue of each user, and the users take turns. No model in it."""

from __future__ import annotations

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
        self.queues: dict[str, deque[int]] = {}  # by user, the next one first

    @property
    def waiting(self) -> int:
        return sum(map(len, self.queues.values()))

    def add(self, number: int, user: str) -> None:
        """Adds a request."""
        self.queues.setdefault(user, deque()).append(number)

    def admit(self, fits: Callable[[int, int], bool] = lambda new, other: True) -> list[int]:
        """Fills free places; returns the requests that come in, which stand behind those that are here. If the next one does
        not fit beside one that is here, it and all behind it wait until that one has left."""
        come = []
        while self.queues and len(self.here) < self.room:
            user = next(iter(self.queues))
            if not all(fits(self.queues[user][0], other) for other in self.here):
                break
            queue = self.queues.pop(user)
            self.here.append(queue.popleft())
            come.append(self.here[-1])
            if queue:
                self.queues[user] = queue  # behind the others
        return come

    def leave(self, numbers) -> list[int]:
        """Removes requests, waiting or not. Returns the old positions of those that stay; the last ones fill the gaps."""
        gone = set(numbers)
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
