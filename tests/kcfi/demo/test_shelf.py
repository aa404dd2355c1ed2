"""Answers are kept within a budget of bytes."""

from dataclasses import dataclass, field

from kcfi.demo.shelf import Shelf


@dataclass
class Thing:
    size: int
    closed: list = field(default_factory=list)

    def close(self):
        self.closed.append(True)


def test_the_oldest_leave_when_the_shelf_is_full():
    shelf = Shelf(megabytes=1)
    things = [Thing(400_000) for _ in range(3)]
    names = [shelf.put(thing) for thing in things]
    assert [shelf.get(name) for name in names] == [None, things[1], things[2]]
    assert [thing.closed for thing in things] == [[True], [], []]


def test_what_was_asked_for_last_stays():
    shelf = Shelf(megabytes=1)
    first, second, third = (Thing(400_000) for _ in range(3))
    names = [shelf.put(first), shelf.put(second)]
    assert shelf.get(names[0]) is first
    shelf.put(third)
    assert shelf.get(names[0]) is first and shelf.get(names[1]) is None and second.closed == [True]


def test_the_newest_stays_however_large_it_is():
    shelf = Shelf(megabytes=1)
    small, large = Thing(10), Thing(5_000_000)
    first, second = shelf.put(small), shelf.put(large)
    assert shelf.get(first) is None and shelf.get(second) is large


def test_names_cannot_be_guessed_and_nothing_stays_after_clear():
    shelf = Shelf(megabytes=1)
    thing = Thing(1)
    names = {shelf.put(thing) for _ in range(50)}
    assert len(names) == 50 and min(map(len, names)) >= 22 and shelf.get("") is None
    shelf.clear()
    assert len(thing.closed) == 50 and not any(shelf.get(name) for name in names)


def test_what_has_been_there_too_long_is_closed(monkeypatch):
    shelf, now = Shelf(megabytes=1), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    old, young = Thing(1), Thing(1)
    names = [shelf.put(old)]
    now[0] = 50
    names.append(shelf.put(young))
    shelf.get(names[0])  # looking at it does not make it younger
    now[0] = 60
    shelf.clear(age=60)
    assert [shelf.get(name) for name in names] == [None, young] and old.closed == [True] and not young.closed
