"""What stands between the network and Gradio: what may be asked, limits, and headers that keep browsers here.

Gradio's server can do more than this page needs: fetch addresses that a request names, run functions past the queue,
proxy. None of it gets through. Requests that are refused have the status that says why, and one sentence.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from anyio import current_time, fail_after, move_on_after
from anyio.to_thread import run_sync
from starlette.formparsers import MultiPartException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kcfi.demo.limits import RECEIVED, Limits, Refused, check_upload, inside
from kcfi.demo.runs import Runs

API = "/gradio_api"
FILE, JOIN, UPLOAD, STREAM = f"{API}/file=", f"{API}/queue/join", f"{API}/upload", f"{API}/queue/data"
ASKED = {
    "GET": re.compile(
        rf"/|/config|/theme\.css|/favicon\.ico|/(assets|static|examples|answers|scenes)/.+"
        rf"|{API}/(info|app_id|startup-events|theme\.css|upload_progress|queue/data|heartbeat/\w+|file=.+)"
    ),
    "POST": re.compile(rf"{API}/(upload|queue/join|cancel|reset)/?"),
}
EVENT_BYTES = 100_000  # of a request without files
ENVELOPE_BYTES = 10_000  # around the files of one with files
DRAINED = 2  # seconds for which the rest of a request that is too large is dropped
HERE_ALONE = (  # Gradio's own scripts are inline, and its templates are compiled in the browser
    b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data: blob:; connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'none'; "
    b"frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", HERE_ALONE),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """ASGI middleware around the app of the page.

    Args:
        app: what is asked when nothing is refused.
        limits: of the page.
        folder: of the uploads.
        runs: learn who listens for answers.
    """

    def __init__(self, app: ASGIApp, limits: Limits, folder: Path, runs: Runs) -> None:
        self.app, self.limits, self.folder, self.runs = app, limits, folder, runs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        exchange = _Exchange(receive, send)
        try:
            with ExitStack() as stack:
                await self._admit(scope, exchange, stack)
                await self.app(scope, exchange.receive, exchange.send)
        except Exception as error:
            refusal = error if isinstance(error, Refused) else exchange.refusal
            if refusal is None or exchange.started:
                raise
            told = {"detail": str(refusal), "error": str(refusal)}  # Gradio's own page and its client read either
            headers = {"connection": "close"} if refusal.status == 413 else {}  # the rest of the body is not read
            exchange.refusal = None
            if refusal.status == 413:
                await exchange.drain()
            await JSONResponse(told, refusal.status, headers)(scope, receive, exchange.send)

    async def _admit(self, scope: Scope, exchange: "_Exchange", stack: ExitStack) -> None:
        """Refuse a request that the app must not see; `stack` is closed with its answer."""
        path = scope["path"]
        if not (scope["method"] in ASKED and ASKED[scope["method"]].fullmatch(path)):
            raise Refused(404, "This page has nothing of that name.")
        if path.startswith(FILE) and not inside(self.folder, path.removeprefix(FILE)):
            raise Refused(403, "Only files that were uploaded to this page, or made by it, are sent.")
        if path == STREAM:
            query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
            sessions = query.get("session_hash", [])
            if len(sessions) != 1:
                raise Refused(400, "A request for answers names one session.")
            stack.enter_context(self.runs.listen(sessions[0]))
        if scope["method"] == "POST":
            exchange.most = EVENT_BYTES
            if path.startswith(UPLOAD):
                exchange.most = int(self.limits.megabytes * 1e6) + ENVELOPE_BYTES
            exchange.check(int(dict(scope["headers"]).get(b"content-length", b"0")))
        if path.startswith(JOIN):
            await run_sync(check_event, self.folder, await exchange.read(), self.limits)


def check_event(folder: Path, body: bytes, limits: Limits) -> None:
    """Refuse an event that names anything but uploads.

    Raises:
        Refused: 400, or what `check_upload` refuses.
    """
    try:
        event = json.loads(body)
        named = list(_files(event))
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The request is not JSON.") from error
    for file in named:
        check_upload(folder, file.get("path"), limits)
        if str(file.get("url") or "").startswith("data:"):
            raise Refused(403, "Upload images as files, not inside of a request.")


def _files(value: Any) -> Iterator[dict[str, Any]]:
    """Whatever Gradio could take for a file, at any depth."""
    if isinstance(value, dict):
        if "path" in value or "url" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _files(each)


class _Exchange:
    """A request, counted as it comes, and its answer, with headers of ours.

    Attributes:
        most: bytes of the request that are taken.
        refusal: why it is refused, if it is; whatever the app answers then, this is told.
        started: whether an answer is on its way.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.most, self.came, self.started, self.whole = 0, 0, False, False
        self.until = current_time() + RECEIVED
        self.read_before: Message | None = None
        self.refusal: Refused | None = None

    def check(self, came: int) -> None:
        """Refuse a request of so many bytes, if they are too many."""
        if came > self.most:
            self.refusal = Refused(413, f"The request is larger than {self.most / 1e6:g} MB: give smaller files.")
            raise self.refusal

    async def receive(self) -> Message:
        """The next part of the request."""
        message, self.read_before = self.read_before, None
        if message is None and self.whole:
            return await self._receive()  # that the client leaves
        if message is None:
            try:
                with fail_after(self.until - current_time()):
                    message = await self._receive()
                self.whole = not message.get("more_body", False)
                self.came += len(message.get("body", b""))
                self.check(self.came)
            except TimeoutError:
                self.refusal = Refused(408, f"The request did not come within {RECEIVED} s: give smaller files.")
            except Refused:
                pass  # told instead of whatever the app answers
            if self.refusal or message is None or message["type"] == "http.disconnect":
                raise MultiPartException("The request ended early.")  # at which Gradio deletes what came
        return message

    async def drain(self) -> None:
        """Drop some of what still comes: a connection that is closed before loses the answer."""
        with move_on_after(DRAINED):
            while not self.whole:
                message = await self._receive()
                self.came += len(message.get("body", b""))
                self.whole = not message.get("more_body", False)

    async def read(self) -> bytes:
        """The whole body, which `receive` then gives again."""
        body, more = b"", True
        while more:
            message = await self.receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)  # not there when the client has left
        self.read_before = {"type": "http.request", "body": body, "more_body": False}
        return body

    async def send(self, message: Message) -> None:
        """The next part of the answer."""
        if message["type"] == "http.response.start":
            if message["status"] == 503:  # Gradio's queue has no place left, the one reason for it to say so
                self.refusal = Refused(429, "Too many others are waiting. Try again in a minute.")
            if self.refusal is not None:
                raise self.refusal
            self.started = True
            own = {name.lower() for name, _ in message["headers"]}
            added = [header for header in HEADERS if header[0] not in own]
            message = {**message, "headers": [*message["headers"], *added]}
        await self._send(message)
