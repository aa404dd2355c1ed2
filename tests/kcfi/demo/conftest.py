"""A page of the tiny detector, served on a free port of this machine, and a client that speaks as a browser does."""

import io
import json
import os
import secrets
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from kcfi.demo.limits import Limits
from kcfi.demo.server import build_app
from kcfi.models import load
from kcfi.processing import Describer

SECONDS = 60  # that anything may take


class Client:
    """What a browser sends to the page.

    `guard` is the app; its runs and page are behind it.
    """

    def __init__(self, address, guard, folder):
        self.address, self.guard, self.folder = address, guard, folder
        self.session = secrets.token_hex(6)
        self.http = httpx.Client(base_url=address, timeout=SECONDS)
        self.functions = {each["api_name"]: each["id"] for each in self.http.get("/config").json()["dependencies"]}

    def upload(self, *images, name="image.png"):
        """Post images, or bytes: files as events name them."""
        files = [("files", (name, image if isinstance(image, bytes) else png(image))) for image in images]
        answer = self.http.post("/gradio_api/upload", files=files)
        answer.raise_for_status()
        return [{"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}} for path in answer.json()]

    def join(self, function, data, session=None):
        """Post an event."""
        body = {"data": data, "fn_index": self.functions[function], "session_hash": session or self.session}
        return self.http.post("/gradio_api/queue/join", json=body)

    def listen(self, session=None):
        """Messages of a session until its last event is done."""
        with self.http.stream(
            "GET", "/gradio_api/queue/data", params={"session_hash": session or self.session}
        ) as lines:
            for line in lines.iter_lines():
                if line.startswith("data:"):
                    message = json.loads(line[5:])
                    yield message
                    if message["msg"] == "close_stream":
                        return

    def ask(self, function, data):
        """Run a function: its last message."""
        answer = self.join(function, data)
        assert answer.status_code == 200, answer.text
        [done] = [message for message in self.listen() if message["msg"] == "process_completed"]
        return done

    def describe(self, before, after, threshold=0.5, masked=True):
        """Upload a pair and describe it: what the page shows, or the message of an error."""
        done = self.ask("describe", [*self.upload(before, after), threshold, masked])
        return done["output"]["data"] if done["success"] else done["output"]["error"]


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@contextmanager
def serve_page(model, folder, describer=Describer, **limits):
    """A client of a page of this model; one page at a time in a process, the inner one of two."""
    folder.mkdir(exist_ok=True)
    before = os.environ.get("GRADIO_TEMP_DIR")
    app = build_app(describer(*load(str(model), device="cpu")), "a <b>model</b>", Limits(**limits), folder)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server ended"
            time.sleep(0.05)
        try:
            yield Client(f"http://127.0.0.1:{listening.getsockname()[1]}", app, folder)
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            if before is None:
                os.environ.pop("GRADIO_TEMP_DIR", None)
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture(scope="module")
def client(detector, tmp_path_factory):
    with serve_page(detector, tmp_path_factory.mktemp("page")) as client:
        yield client


@pytest.fixture
def serving(detector, tmp_path):
    """`serve_page` of the detector with other limits."""
    return lambda model=detector, **limits: serve_page(model, Path(tmp_path) / "page", **limits)
