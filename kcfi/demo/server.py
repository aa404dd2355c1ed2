"""The page as an app, its downloads beside it, and the server of `kcfi demo`."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import IO, Annotated, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: nothing is told to anybody
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"  # nor kept: its list of past events grows otherwise

import gradio as gr
import uvicorn
from anyio import create_task_group, sleep
from anyio.to_thread import run_sync
from fastapi import FastAPI, HTTPException, Query, Response
from fastapi.staticfiles import StaticFiles
from starlette.responses import StreamingResponse

from kcfi.demo import answers
from kcfi.demo.guard import PageGuard, request_bytes
from kcfi.demo.limits import Limits, sweep
from kcfi.demo.page import EXAMPLES, GONE, THRESHOLD, Page
from kcfi.demo.runs import Runs
from kcfi.demo.shelf import Shelf
from kcfi.models import public_name
from kcfi.processing import Describer, InputError
from kcfi.web.memory import give_back

SANDBOX = (  # of a report: it may draw itself, and nothing else
    "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "frame-ancestors 'self'"
)
TIDIED = 3  # seconds between two looks at what is too old, or too much
ZIPS = 2  # that are made at once
SENT = 1 << 18  # bytes of one that are read at a time
CONNECTIONS = 200  # at once; more get 503
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none are fetched


def build_app(describer: Describer, model: str, limits: Limits, folder: Path) -> PageGuard:
    """The page as an ASGI app; one in a process.

    Args:
        describer: of a model with a change detection head.
        model: its name, as it is shown.
        limits: of the page.
        folder: for uploads, pictures and reports; whoever owns it deletes it.

    Raises:
        InputError: a model without a head.
    """
    if describer.model.model.change_detection_head is None:
        raise InputError("This model has no change detection head: the page has no mask to show.")
    uploads, scenes = folder / "uploads", folder / "scenes"
    for each in (uploads, scenes):
        each.mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # Gradio's only way to be told
    runs = Runs(describer.model, limits)
    page = Page(describer, model, limits, runs, scenes)
    blocks = page.build()

    def delete_old() -> None:
        sweep(uploads, limits)
        page.answers.clear(limits.stored_seconds)
        page.scenes.clear(limits.stored_seconds)
        blocks.upload_file_set.clear()  # names of all uploads, that Gradio would keep for its end
        give_back()

    async def tidy() -> None:
        while True:
            await run_sync(delete_old)
            await sleep(TIDIED)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        async with create_task_group() as tasks:
            tasks.start_soon(tidy)
            yield
            tasks.cancel_scope.cancel()
        page.answers.clear()
        page.scenes.clear()

    app = FastAPI(openapi_url=None, lifespan=lifespan)
    app.mount("/examples", StaticFiles(directory=EXAMPLES))

    packing = threading.BoundedSemaphore(ZIPS)

    def pack(shelf: Shelf[Any], name: str, write: Callable[[Any, IO[bytes]], None], saved_as: str) -> Response:
        """A zip of what is kept, in a file that is deleted when it was sent, or with those of broken uploads.

        It stays open from the first byte to the last, and so is sent though it is deleted meanwhile.
        """
        kept = _found(shelf.get(name))
        if not packing.acquire(blocking=False):
            raise HTTPException(429, "Others are downloading. Try again in a few seconds.")
        try:
            file = NamedTemporaryFile(dir=uploads, delete=False)  # `_sent` closes it
            write(kept, file)
        except FileNotFoundError:  # of a report that is being deleted
            raise HTTPException(404, GONE) from None
        finally:
            packing.release()
        _found(shelf.get(name))  # it may have gone while it was read
        headers = {"content-length": str(file.tell()), "content-disposition": f'attachment; filename="{saved_as}"'}
        return StreamingResponse(_sent(file), media_type="application/zip", headers=headers)

    @app.get("/answers/{name}.zip")
    def answer_zip(name: str, threshold: Annotated[float, Query(ge=0, le=1)] = THRESHOLD) -> Response:
        return pack(page.answers, name, lambda kept, file: answers.write_zip(kept, threshold, file), "kcfi-answer.zip")

    @app.get("/scenes/{name}.zip")
    def scene_zip(name: str) -> Response:
        from kcfi.demo.scene import write_zip

        return pack(page.scenes, name, write_zip, "kcfi-scene.zip")

    @app.get("/scenes/{name}/report.html")
    def scene_report(name: str) -> Response:
        folder = _found(page.scenes.get(name)).folder
        try:
            content = (folder / "report.html").read_bytes()
        except FileNotFoundError:
            raise HTTPException(404, GONE) from None
        return Response(content, media_type="text/html", headers={"content-security-policy": SANDBOX})

    here = Path(__file__).parent
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        show_error=False,  # messages of errors are for whoever runs the page; ours are `gr.Error`
        max_file_size=request_bytes(limits),  # of a file alone: never reached, as Gradio's refusal is no JSON
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        ssr_mode=False,
        mcp_server=False,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", **FONTS),
        css_paths=[here / "page.css"],
        js=(here / "page.js").read_text(encoding="utf-8"),
    )
    return PageGuard(app, limits, uploads, runs)


def serve(describer: Describer, model: str, host: str, port: int, limits: Limits) -> None:
    """Serve the page until the process is interrupted: the work of `kcfi demo`.

    Raises:
        InputError: the port is taken, or the host none of this machine; or what `build_app` refuses.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the folder is deleted then, too
    with TemporaryDirectory(prefix="kcfi-demo-") as folder:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        app = build_app(describer, public_name(model), limits, Path(folder))
        try:
            listening = socket.create_server((host, port), family=family)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"Cannot serve on {host}, port {port} ({reason}): choose another --port.") from error
        with listening:
            shown = f"[{host}]" if ":" in host else host
            print(f"http://{shown}:{listening.getsockname()[1]} (Ctrl-C ends it)", flush=True)
            config = uvicorn.Config(
                app,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=1,
                limit_concurrency=CONNECTIONS,
            )
            uvicorn.Server(config).run(sockets=[listening])


def _sent(file: Any) -> Iterator[bytes]:
    """The content of a temporary file, which is then deleted."""
    try:
        file.seek(0)
        while block := file.read(SENT):
            yield block
    finally:
        file.close()
        Path(file.name).unlink(missing_ok=True)


def _found(kept: Any) -> Any:
    """What was kept, or error 404."""
    if kept is None:
        raise HTTPException(404, GONE)
    return kept
