"""What may be asked of Gradio: what the page needs, within limits, and headers that keep browsers here.

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

from anyio.to_thread import run_sync
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope

from kcfi.demo.limits import Limits, check_upload, inside
from kcfi.demo.runs import Runs
from kcfi.web.guard import Broken, Exchange, Guard, replayed
from kcfi.web.limits import Refused

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
FILES = 10  # of an upload; the page sends one
FULL = "Too many others are waiting. Try again in a minute."
HERE_ALONE = (  # Gradio's own scripts are inline, and its templates are compiled in the browser
    b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data: blob:; connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'none'; "
    b"frame-ancestors 'none'"
)


class PageGuard(Guard):
    """ASGI middleware around the app of the page.

    Args:
        app: what is asked when nothing is refused.
        limits: of the page.
        folder: of the uploads.
        runs: learn who listens for answers.
    """

    headers = ((b"content-security-policy", HERE_ALONE), *Guard.headers)

    def __init__(self, app: ASGIApp, limits: Limits, folder: Path, runs: Runs) -> None:
        super().__init__(app)
        self.limits, self.folder, self.runs = limits, folder, runs

    async def answer(self, scope: Scope, exchange: Exchange) -> None:
        """Ask the app, or refuse a request that it must not see."""
        path = scope["path"]
        receive: Receive = exchange.receive
        exchange.full = FULL  # Gradio's queue has no place left: the one reason for it to say 503
        if not (scope["method"] in ASKED and ASKED[scope["method"]].fullmatch(path)):
            raise Refused(404, "This page has nothing of that name.")
        if path.startswith(FILE) and not inside(self.folder, path.removeprefix(FILE)):
            raise Refused(403, "Only files that were uploaded to this page, or made by it, are sent.")
        with ExitStack() as stack:
            if path == STREAM:
                query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
                sessions = query.get("session_hash", [])
                if len(sessions) != 1:
                    raise Refused(400, "A request for answers names one session.")
                stack.enter_context(self.runs.listen(sessions[0]))
            if scope["method"] == "POST" and path.startswith(UPLOAD):
                exchange.expect(scope, request_bytes(self.limits))
                receive = few_files(scope, exchange)
            elif scope["method"] == "POST":
                exchange.expect(scope, EVENT_BYTES)
            if path.startswith(JOIN):
                body = await exchange.read()
                await run_sync(check_event, self.folder, body, self.limits)
                receive = replayed(body, exchange.receive)
            await self.app(scope, receive, exchange.send)


def request_bytes(limits: Limits) -> int:
    """Bytes of a request with files, at most."""
    return int(limits.megabytes * 1e6) + ENVELOPE_BYTES


def few_files(scope: Scope, exchange: Exchange) -> Receive:
    """The parts of an upload, which is refused at more than `FILES` files: each is one of the disk, however small."""
    _, options = parse_options_header(Headers(scope=scope).get("content-type"))  # of two headers the first, as Gradio
    border = b"--" + options.get(b"boundary", b"")
    borders, end = 0, b""  # of the borders seen, and what may be the beginning of the next one

    async def receive() -> Message:
        nonlocal borders, end
        message = await exchange.receive()
        came = end + message.get("body", b"")
        borders, end = borders + came.count(border), came[len(came) - len(border) + 1 :]
        if borders > FILES + 1:
            exchange.refusal = Refused(413, f"More than {FILES} files in a request: send them one by one.")
            raise Broken("Too many files.")
        return message

    return receive


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
