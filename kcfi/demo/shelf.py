"""Answers that are kept for a while, by names that cannot be guessed."""

import secrets
import threading
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
        self.lock = threading.Lock()

    def put(self, item: Item) -> str:
        """Keep something; the oldest leave the shelf.

        Returns:
            Its name.
        """
        name = secrets.token_urlsafe(16)
        with self.lock:
            self.items[name] = item
            while len(self.items) > 1 and sum(kept.size for kept in self.items.values()) > self.most:
                self.items.popitem(last=False)[1].close()
        return name

    def get(self, name: str) -> Item | None:
        """What has this name; None: it is not there any more, or never was."""
        with self.lock:
            if name in self.items:
                self.items.move_to_end(name)
            return self.items.get(name)

    def clear(self) -> None:
        """Close everything."""
        with self.lock:
            while self.items:
                self.items.popitem()[1].close()
