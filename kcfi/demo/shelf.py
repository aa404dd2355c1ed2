"""Answers that are kept for a while, by names that cannot be guessed."""

import secrets
import threading
import time
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Kept(Protocol):
    """Something on the shelf."""

    @property
    def size(self) -> int:
        """Bytes of memory or disk that it takes."""

    def close(self) -> None:
        """Called when it leaves the shelf."""


Item = TypeVar("Item", bound=Kept)


class Shelf(Generic[Item]):
    """Keeps the answers that were last asked for; the newest stays, however large it is.

    Args:
        megabytes: of all together, 10^6 bytes.
    """

    def __init__(self, megabytes: float) -> None:
        self.most = megabytes * 1e6
        self.items: OrderedDict[str, Item] = OrderedDict()
        self.put_at: dict[str, float] = {}  # seconds of the monotonic clock, by name
        self.lock = threading.Lock()

    def put(self, item: Item) -> str:
        """Keep something; the oldest leave the shelf.

        Returns:
            Its name.
        """
        name, left = secrets.token_urlsafe(16), []
        with self.lock:
            self.items[name], self.put_at[name] = item, time.monotonic()
            sizes = [kept.size for kept in self.items.values()]
            total = sum(sizes)
            for old, size in zip(list(self.items)[:-1], sizes, strict=False):
                if total > self.most:
                    left.append(self._take(old))
                    total -= size
        for each in left:  # outside of the lock: deleting a report takes a while
            each.close()
        return name

    def get(self, name: str) -> Item | None:
        """What has this name; None: it is not there any more, or never was."""
        with self.lock:
            if name in self.items:
                self.items.move_to_end(name)
            return self.items.get(name)

    def clear(self, age: float = 0) -> None:
        """Close what has been there for so many seconds."""
        with self.lock:
            old = [name for name, since in self.put_at.items() if time.monotonic() - since >= age]
            left = [self._take(name) for name in old]
        for each in left:
            each.close()

    def _take(self, name: str) -> Item:
        """Take something off the shelf."""
        del self.put_at[name]
        return self.items.pop(name)
