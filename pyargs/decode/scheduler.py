"""Who is answered next: requests wait by user, and the users take turns. No model in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Scheduler:
    """Requests, by their numbers, that wait for one of `room` places.

    A user's requests are taken in order of arrival. Users take turns: who was served last is last in the queue, so a lone
    request waits for at most one other user's turn behind any number of requests of one user.
    """

    def __init__(self, room: int):
        self.room = room
        self.here: list[int] = []  # the requests that are being answered, by position
        self.queues: dict[str, deque[int]] = {}  # by user, the next one first

    @property
    def waiting(self) -> int:
        return sum(map(len, self.queues.values()))

    def add(self, number: int, user: str) -> None:
        """A request comes in."""
        self.queues.setdefault(user, deque()).append(number)

    def admit(self, fits: Callable[[int, int], bool] = lambda new, other: True) -> list[int]:
        """Fills the free places: the requests that come in now, behind those that are here. Where the next one does not fit
        beside one that is here, it and all behind it wait until that one has left."""
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
        """Requests go, waiting or not. Returns the positions of those that stay, the last ones in the places that are free."""
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
