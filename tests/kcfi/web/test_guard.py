"""Requests as they come over the network: counted, timed, refused with one sentence, and answered with our headers."""

import asyncio
import json

import pytest

from kcfi.web import guard as module
from kcfi.web.guard import Broken, Guard, replayed
from kcfi.web.limits import Refused
from kcfi.web.runs import Left


class Echo(Guard):
    """Reads up to `most` bytes and lets the app answer; `error` is raised in place of that."""

    error = None

    async def answer(self, scope, exchange):
        exchange.full = "Too many are here."
        exchange.expect(scope, 10)
        body = await exchange.read()
        if self.error:
            raise self.error
        await self.app(scope, replayed(body, exchange.receive), exchange.send)


async def echo(scope, receive, send):
    """Sends back what comes; 503 for the word "full"."""
    body = (await receive())["body"]
    status = 503 if body == b"full" else 200
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


def call(guard, *parts, headers=(), method="POST", gap=0.0):
    """What a client is told: status, headers and body; None: nothing. Behind the last part it leaves."""
    messages = [
        {"type": "http.request", "body": part, "more_body": index < len(parts) - 1} for index, part in enumerate(parts)
    ]
    sent = []

    async def receive():
        await asyncio.sleep(gap)
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/", "headers": list(headers)}
    asyncio.run(guard(scope, receive, send))
    if not sent:
        return None
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(part.get("body", b"") for part in sent[1:])


def test_a_request_reaches_the_app_and_its_answer_has_our_headers():
    status, headers, body = call(Echo(echo), b"a", b"b", b"c")
    assert (status, body) == (200, b"abc") and headers[b"x-content-type-options"] == b"nosniff"


def test_a_refusal_is_one_sentence_in_json():
    guard = Echo(echo)
    guard.error = Refused(403, "Not this one.")
    status, headers, body = call(guard, b"a")
    assert status == 403 and json.loads(body) == {"detail": "Not this one.", "error": "Not this one."}
    assert headers[b"x-content-type-options"] == b"nosniff" and b"connection" not in headers


@pytest.mark.parametrize("declared", [True, False])
def test_too_many_bytes_are_refused_and_the_rest_is_dropped(declared):
    headers = [(b"content-length", b"12")] if declared else []
    status, told, body = call(Echo(echo), b"123456", b"789012", headers=headers)
    assert status == 413 and b"larger than 1e-05 MB" in body
    assert told.get(b"connection") == (b"close" if declared else None)


def test_a_request_that_comes_too_slowly_is_refused(monkeypatch):
    monkeypatch.setattr(module, "RECEIVED", 0.05)
    monkeypatch.setattr(module, "DRAINED", 0.05)
    status, _, body = call(Echo(echo), b"a", b"b", gap=0.5)
    assert status == 408 and b"did not come within" in body


def at_once(guard, count):
    """`count` clients of which each sends a byte and no more, then one that sends all: statuses, in that order."""

    async def client(answers, *parts):
        messages = [{"type": "http.request", "body": part, "more_body": part != parts[-1]} for part in parts]

        async def receive():
            return messages.pop(0) if len(messages) > (b"" in parts) else await asyncio.Event().wait()

        async def send(message):
            answers.append(message.get("status"))

        await guard({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send)

    async def all_of_them():
        slow = [[] for _ in range(count)]
        waiting = [asyncio.ensure_future(client(answers, b"a", b"")) for answers in slow]
        await asyncio.sleep(0)
        quick = []
        await asyncio.wait_for(client(quick, b"a", b"b"), 5)
        await asyncio.sleep(0.2)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert guard.coming == []
        return [answers[0] if answers else None for answers in (*slow, quick)]

    return asyncio.run(all_of_them())


def test_who_sends_slowly_makes_room_for_others_and_the_first_of_them_alone(monkeypatch):
    """Failed before: nobody had to."""
    monkeypatch.setattr(module, "DRAINED", 0.05)
    assert at_once(Echo(echo), module.COMING - 1) == [None] * (module.COMING - 1) + [200]
    assert at_once(Echo(echo), module.COMING) == [408] + [None] * (module.COMING - 1) + [200]


def test_an_app_without_a_place_is_told_in_our_words():
    status, _, body = call(Echo(echo), b"full")
    assert status == 429 and json.loads(body)["error"] == "Too many are here."


def test_who_has_left_is_told_nothing():
    guard = Echo(echo)
    assert call(guard) is None
    for error in (Left(), Broken("x")):
        guard.error = error
        assert call(guard, b"a") is None


def test_bugs_are_no_refusals():
    guard = Echo(echo)
    guard.error = KeyError("a bug")
    with pytest.raises(KeyError):
        call(guard, b"a")


def test_nothing_but_http_is_answered():
    async def fail(*_):
        raise AssertionError

    asyncio.run(Echo(fail)({"type": "websocket"}, fail, fail))
