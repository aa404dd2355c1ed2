"""Places, turns and ends of requests, with an app that takes as long as it is told."""

import asyncio
import json
from types import SimpleNamespace

import pytest
import torch

from kcfi.web.chat_guard import CHAT, ChatGuard
from kcfi.web.limits import RequestLimits
from tests.kcfi.web.test_chat import request

JSON = (b"content-type", b"application/json")


class App:
    """Calls the model `words` times, a moment apart, and sends what it was asked."""

    def __init__(self, words=1):
        self.words, self.asked, self.at_once, self.most = words, [], 0, 0
        parts = SimpleNamespace(vision_tower=torch.nn.Identity(), language_model=torch.nn.Identity())
        self.model = SimpleNamespace(model=parts)

    async def __call__(self, scope, receive, send):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            self.asked.append((dict(scope["headers"]), (await receive())["body"]))
            for _ in range(self.words):
                await asyncio.sleep(0.01)
                self.model.model.language_model(torch.zeros(1))
        finally:
            self.at_once -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


class Client:
    """One request; it leaves when `leaves` is set."""

    def __init__(self, body=None, path=CHAT, method="POST", headers=(JSON,), whole=True):
        self.scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        self.body, self.sent, self.leaves = body or json.dumps(request()).encode(), [], asyncio.Event()
        self.given, self.whole = False, whole

    async def receive(self):
        if self.given:
            await self.leaves.wait()
            return {"type": "http.disconnect"}
        self.given = True
        return {"type": "http.request", "body": self.body, "more_body": not self.whole}

    async def send(self, message):
        self.sent.append(message)

    @property
    def status(self):
        return self.sent[0]["status"] if self.sent else None


def guarded(app, **limits):
    return ChatGuard(app, app.model, "<image>", ["tiny"], RequestLimits(**limits))


def run(guard, *clients):
    """All clients at once."""

    async def all_of_them():
        await asyncio.gather(*(guard(client.scope, client.receive, client.send) for client in clients))

    asyncio.run(all_of_them())
    assert guard.places == guard.limits.waiting + 1 and not guard.computing.locked()


def test_the_app_gets_a_new_request_that_says_nothing_of_the_old_one_s_length():
    app = App()
    client = Client(headers=[JSON, (b"content-length", b"9"), (b"x-request-id", b"a")])
    run(guarded(app), client)
    [(headers, body)] = app.asked
    assert client.status == 200 and b"content-length" not in headers and headers[b"x-request-id"] == b"a"
    assert json.loads(body).keys() == {"messages", "stream", "max_tokens"}


def test_one_is_computed_some_wait_and_others_are_refused():
    app, clients = App(words=3), [Client() for _ in range(5)]
    run(guarded(app, waiting=2), *clients)
    assert [client.status for client in clients] == [200, 200, 200, 429, 429] and app.most == 1
    assert len(app.asked) == 3


def test_who_sends_slowly_has_no_place_before_all_is_there():
    """Failed before: as many as there are places shut the server."""
    app, slow, quick = App(), [Client(b"{", whole=False) for _ in range(9)], Client()
    guard = guarded(app)

    async def quick_then_all_leave():
        await asyncio.wait_for(guard(quick.scope, quick.receive, quick.send), 5)
        assert len(guard.coming) == 9 and guard.places == 9
        for client in slow:
            client.leaves.set()

    async def all_of_them():
        others = (guard(client.scope, client.receive, client.send) for client in slow)
        await asyncio.gather(*others, quick_then_all_leave())

    asyncio.run(all_of_them())
    assert [client.status for client in (*slow, quick)] == [None] * 9 + [200] and not guard.coming


def test_who_finds_no_place_when_all_is_there_is_refused():
    app, late = App(words=20), Client()
    guard = guarded(app, waiting=1)
    others = [Client(), Client()]

    async def begin_early():
        late_receive, began = late.receive, asyncio.Event()

        async def receive():
            began.set()
            while guard.places:
                await asyncio.sleep(0.01)
            return await late_receive()

        asked = asyncio.ensure_future(guard(late.scope, receive, late.send))
        await began.wait()
        await asyncio.gather(asked, *(guard(client.scope, client.receive, client.send) for client in others))

    asyncio.run(begin_early())
    assert [client.status for client in (late, *others)] == [429, 200, 200] and guard.places == 2


def test_who_leaves_while_it_waits_is_never_computed():
    app, clients = App(words=5), [Client(), Client()]
    clients[1].leaves.set()
    run(guarded(app), *clients)
    assert [client.status for client in clients] == [200, None] and len(app.asked) == 1


def test_who_leaves_while_it_is_computed_is_computed_no_further():
    app, clients = App(words=10_000), [Client(), Client()]
    guard = guarded(app)

    async def leave():
        while not app.asked:
            await asyncio.sleep(0.01)
        app.words = 1  # for the next one
        clients[0].leaves.set()

    async def both():
        await asyncio.gather(leave(), *(guard(client.scope, client.receive, client.send) for client in clients))

    asyncio.run(both())
    assert [client.status for client in clients] == [None, 200] and guard.places == 9


def test_a_run_that_takes_too_long_ends_with_504():
    client = Client()
    run(guarded(App(words=10_000), seconds=0.1), client)
    assert client.status == 504 and b"longer than the 0.1 s" in client.sent[1]["body"]


def test_nothing_stays_hooked_to_the_model():
    app = App()
    run(guarded(app), Client())
    assert not app.model.model.language_model._forward_pre_hooks


@pytest.mark.parametrize(
    ("client", "status"),
    [
        ({"path": "/reset"}, 404),
        ({"method": "GET"}, 404),
        ({"headers": [(b"content-type", b"text/plain")]}, 415),
        ({"headers": []}, 415),
        ({"headers": [(b"content-type", b"application/json; charset=utf-8")]}, 200),
        ({"headers": [JSON, (b"content-length", b"65000000")]}, 413),
        ({"body": b"{"}, 400),
        ({"path": "/health", "method": "GET", "headers": []}, 200),
        ({"path": "/v1/models", "method": "OPTIONS", "headers": []}, 200),
    ],
)
def test_what_reaches_the_app(client, status):
    app, client = App(), Client(**client)
    run(guarded(app), client)
    assert client.status == status and len(app.asked) == (status == 200)
