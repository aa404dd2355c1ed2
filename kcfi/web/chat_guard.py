"""What may be asked of the server of transformers: captions of pairs, one at a time, in time, for whoever waits.

Of its own, that server fetches the addresses and opens the files that a request names, takes generation settings and
chat templates from it, loads other models, and computes for clients that have left.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.types import ASGIApp, Message, Scope

from kcfi.web.chat import plain_request
from kcfi.web.guard import Exchange, Guard, replayed
from kcfi.web.limits import Refused, RequestLimits
from kcfi.web.runs import Left, check_time, parts_of, watched

CHAT = "/v1/chat/completions"
ASKED = {("GET", "/health"), ("GET", "/v1/models"), ("POST", CHAT), ("OPTIONS", CHAT), ("OPTIONS", "/v1/models")}


class ChatGuard(Guard):
    """ASGI middleware around the server of transformers.

    A request has a place from when all of it is there until its answer has ended or its client has left; there are as
    many as runs may wait, and one more. Where none is free, a request is refused before it is read.

    Args:
        app: the server; it has loaded the model.
        model: the one that it serves.
        image_token: placeholder of its prompts.
        names: by which it may be asked for; the first is shown.
        limits: of the server.
    """

    def __init__(
        self, app: ASGIApp, model: Any, image_token: str, names: Sequence[str], limits: RequestLimits
    ) -> None:
        super().__init__(app)
        self.parts, self.image_token, self.names, self.limits = parts_of(model), image_token, names, limits
        self.places = limits.waiting + 1  # that are free
        self.reading, self.computing = CapacityLimiter(1), asyncio.Lock()

    async def answer(self, scope: Scope, exchange: Exchange) -> None:
        """Ask the app, or refuse a request that it must not see."""
        asked = (scope["method"], scope["path"])
        if asked not in ASKED:
            raise Refused(404, f"This server has nothing of that name: POST {CHAT}, GET /v1/models or /health.")
        if asked[0] != "POST":
            await self.app(scope, replayed(b"", forever), exchange.send)
            return
        kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":  # any page may let a browser send other kinds here
            raise Refused(415, "A request is of the Content-Type application/json.")
        self._check_places()
        exchange.expect(scope, int(self.limits.megabytes * 1e6))
        given = await exchange.read(), self.names, self.image_token, self.limits
        self._check_places()  # others may have come faster
        self.places -= 1
        try:
            body = await run_sync(plain_request, *given, limiter=self.reading)
            del given  # as large as the limit allows
            await self._ask(scope, exchange, body)
        finally:
            self.places += 1

    def _check_places(self) -> None:
        """Refuse a request if none is free."""
        if not self.places:
            raise Refused(429, "Too many others are waiting. Try again in a minute.")

    async def _ask(self, scope: Scope, exchange: Exchange, body: bytes) -> None:
        """Let the app answer, when it is the turn of this request.

        Raises:
            Refused: 504; of a stream that has begun it is the last line.
            Left: the client did not wait.
        """
        left = asyncio.ensure_future(exchange.left())

        def check(spent: float) -> None:
            if left.done():
                raise Left("Nobody waits for the answer any more.")
            try:
                check_time(spent, self.limits.seconds)
            except Refused as refusal:
                exchange.refusal = refusal  # told in place of what the app makes of it
                raise

        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        try:
            async with self._turn(left):
                with watched(self.parts, check):
                    await self.app({**scope, "headers": headers}, replayed(body, forever), exchange.send)
        finally:
            left.cancel()

    @asynccontextmanager
    async def _turn(self, left: "asyncio.Future[None]") -> AsyncIterator[None]:
        """Wait until nothing else is computed.

        Raises:
            Left: the client did not wait so long.
        """
        turn = asyncio.ensure_future(self.computing.acquire())
        either: set[asyncio.Future[Any]] = {turn, left}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not turn.done():
            turn.cancel()
            raise Left
        try:
            yield
        finally:
            self.computing.release()


async def forever() -> Message:
    """What an app hears of a client that it need not watch."""
    await asyncio.Event().wait()
    raise AssertionError
