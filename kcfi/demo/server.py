"""The page as an app, its downloads beside it, and the server of `kcfi demo`."""

import os
import signal
import socket
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: nothing is told to anybody
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"  # nor kept: its list of past events grows otherwise

import gradio as gr
import uvicorn
from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

from kcfi.demo import answers
from kcfi.demo.guard import Guard
from kcfi.demo.limits import Limits
from kcfi.demo.page import EXAMPLES, GONE, THRESHOLD, Page
from kcfi.demo.runs import Runs
from kcfi.processing import Describer, InputError

SANDBOX = (  # of a report: it may draw itself, and nothing else
    "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "frame-ancestors 'self'"
)
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none are fetched


def build_app(describer: Describer, model: str, limits: Limits, folder: Path) -> Guard:
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

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        yield
        page.answers.clear()
        page.scenes.clear()

    app = FastAPI(openapi_url=None, lifespan=lifespan)
    app.mount("/examples", StaticFiles(directory=EXAMPLES))

    @app.get("/answers/{name}.zip")
    def answer_zip(name: str, threshold: float = THRESHOLD) -> Response:
        content = answers.as_zip(_found(page.answers.get(name)), threshold)
        return Response(content, media_type="application/zip", headers=_named("kcfi-answer.zip"))

    @app.get("/scenes/{name}.zip")
    def scene_zip(name: str) -> Response:
        from kcfi.demo.scene import as_zip

        file = as_zip(_found(page.scenes.get(name)))
        return StreamingResponse(file, media_type="application/zip", headers=_named("kcfi-scene.zip"))

    @app.get("/scenes/{name}/report.html")
    def scene_report(name: str) -> Response:
        folder = _found(page.scenes.get(name)).folder
        return FileResponse(folder / "report.html", headers={"content-security-policy": SANDBOX})

    here = Path(__file__).parent
    gr.mount_gradio_app(
        app,
        page.build(),
        path="/",
        show_error=False,  # messages of errors are for whoever runs the page; ours are `gr.Error`
        max_file_size=int(limits.megabytes * 1e6),
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
    return Guard(app, limits, uploads, runs)


def serve(describer: Describer, model: str, host: str, port: int, limits: Limits) -> None:
    """Serve the page until the process is interrupted: the work of `kcfi demo`.

    Raises:
        InputError: the port is taken, or the host none of this machine; or what `build_app` refuses.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the folder is deleted then, too
    with TemporaryDirectory(prefix="kcfi-demo-") as folder:
        app = build_app(describer, answers.public_name(model), limits, Path(folder))
        try:
            listening = socket.create_server((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"Cannot serve on {host}, port {port} ({reason}): choose another --port.") from error
        with listening:
            print(f"http://{host}:{listening.getsockname()[1]} (Ctrl-C ends it)", flush=True)
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, server_header=False)
            uvicorn.Server(config).run(sockets=[listening])


def _found(kept: Any) -> Any:
    """What was kept, or error 404."""
    if kept is None:
        raise HTTPException(404, GONE)
    return kept


def _named(name: str) -> dict[str, str]:
    """The header that makes a browser save an answer by this name."""
    return {"content-disposition": f'attachment; filename="{name}"'}
