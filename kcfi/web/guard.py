"""What stands between the network and an app: a request is counted as it comes, and refused with one sentence.

The apps are those of others, and can do more than is wanted here. What they are asked is decided by the `answer` of a
guard: of `kcfi.demo.guard` for Gradio, of `kcfi.web.chat_guard` for the server of transformers.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from anyio import CancelScope, current_time, fail_after, move_on_after
from starlette.formparsers import MultiPartException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kcfi.web.limits import RECEIVED, Refused
from kcfi.web.runs import Left

Headers = Sequence[tuple[bytes, bytes]]

DRAINED = 2  # seconds for which the rest of a request that is refused is dropped
COMING = 16  # requests that send their body at once; those of `kcfi serve` are in memory


class Broken(MultiPartException):
    """A request that ends early; at this class Starlette's parser of forms deletes the files that came with it."""


class Guard(ABC):
    """ASGI middleware; a subclass says what is asked of the app.

    Who sends slowly keeps nobody out: where `COMING` bodies are on their way, the next one takes the room of the one
    that began first.

    Args:
        app: what is asked when nothing is refused.

    Attributes:
        coming: requests whose bodies are on their way, in the order in which they began.
    """

    headers: Headers = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.coming: list[Exchange] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        exchange = Exchange(receive, send, self.headers, self.coming)
        try:
            try:
                await self.answer(scope, exchange)
            finally:
                exchange.leave_room()
        except Exception as error:
            refusal = error if isinstance(error, Refused) else exchange.refusal
            if refusal is None and isinstance(error, Broken | Left):
                return  # there is nobody to be answered
            if refusal is None or exchange.started:
                raise
            told = {"detail": str(refusal), "error": str(refusal)}  # what clients of the apps look for
            unread = scope["method"] == "POST" and not exchange.whole
            exchange.refusal = None
            if unread:
                await exchange.drain()
            headers = {"connection": "close"} if unread else {}
            await JSONResponse(told, refusal.status, headers)(scope, receive, exchange.send)

    @abstractmethod
    async def answer(self, scope: Scope, exchange: "Exchange") -> None:
        """Ask the app, or raise `Refused`."""


def replayed(body: bytes, then: Receive) -> Receive:
    """A request that was read, as an app receives it; `then` is asked for what comes behind it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await then()

    return receive


class Exchange:
    """A request, counted as it comes, and its answer, with headers of ours.

    Args:
        receive: the parts of the request.
        send: the parts of the answer.
        headers: of the answer.
        coming: of the guard.

    Attributes:
        most: bytes of the request that are taken.
        refusal: why it is refused, if it is; whatever the app answers then, this is told.
        whole: whether all of it has come.
        started: whether an answer is on its way.
        full: what is told where the app says 503: it has no place left; None: what the app says.
    """

    def __init__(self, receive: Receive, send: Send, headers: Headers, coming: "list[Exchange]") -> None:
        self._receive, self._send, self._headers, self._coming = receive, send, headers, coming
        self.most, self.came, self.started, self.whole = 0, 0, False, False
        self._until, self._waits = current_time() + RECEIVED, CancelScope()  # for the next part
        self.refusal: Refused | None = None
        self.full: str | None = None

    def expect(self, scope: Scope, most: int) -> None:
        """Take so many bytes, and refuse a request that says that more will come."""
        self.most = most
        self.check(int(dict(scope["headers"]).get(b"content-length", b"0")))
        if len(self._coming) == COMING:
            self._coming[0].give_way()
        self._coming.append(self)

    def give_way(self) -> None:
        """Refuse what has not come yet: another request needs the room."""
        self.leave_room()
        self.refusal = Refused(408, "The request came slowly, and many others came meanwhile: send it again.")
        self._until = self._waits.deadline = current_time()

    def leave_room(self) -> None:
        """Count no longer among those that are on their way."""
        if self in self._coming:
            self._coming.remove(self)

    def check(self, came: int) -> None:
        """Refuse a request of so many bytes, if they are too many."""
        if came > self.most:
            self.refusal = Refused(413, f"The request is larger than {self.most / 1e6:g} MB: give smaller files.")
            raise self.refusal

    async def receive(self) -> Message:
        """The next part of the request."""
        if self.whole:
            return await self._receive()  # that the client leaves
        message: Message = {"type": "http.disconnect"}
        try:
            with fail_after(self._until - current_time()) as self._waits:
                message = await self._receive()
            self.whole = not message.get("more_body", False)
            self.came += len(message.get("body", b""))
            self.check(self.came)
        except TimeoutError:
            late = Refused(408, f"The request did not come within {RECEIVED} s: give smaller files.")
            self.refusal = self.refusal or late
        except Refused:
            pass  # told instead of whatever the app answers
        if self.refusal or message["type"] == "http.disconnect":
            raise Broken("The request ended early.")
        if self.whole:
            self.leave_room()
        return message

    async def read(self) -> bytes:
        """The whole body; `replayed` gives it to the app."""
        parts = []
        while not self.whole:
            parts.append((await self.receive()).get("body", b""))
        return b"".join(parts)

    async def left(self) -> None:
        """Wait until the client has left, or has its answer; after the whole body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def drain(self) -> None:
        """Drop some of what still comes: a connection that is closed before loses the answer."""
        with move_on_after(DRAINED):
            while not self.whole:
                message = await self._receive()
                self.came += len(message.get("body", b""))
                self.whole = not message.get("more_body", False)

    async def send(self, message: Message) -> None:
        """The next part of the answer."""
        if message["type"] == "http.response.start":
            if message["status"] == 503 and self.full:
                self.refusal = Refused(429, self.full)
            if self.refusal is not None:
                raise self.refusal
            self.started = True
            own = {name.lower() for name, _ in message["headers"]}
            added = [header for header in self._headers if header[0] not in own]
            message = {**message, "headers": [*message["headers"], *added]}
        await self._send(message)
