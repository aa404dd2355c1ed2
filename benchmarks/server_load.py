"""Many clients of `kcfi demo` or `kcfi serve` at once, on this machine: their answers, and the server's memory.

    python benchmarks/server_load.py serve [--clients 50] [--seconds 60] [--warm_up 30] [--model kcfi-tiny]
    python benchmarks/server_load.py demo --seconds 180

Starts a server on a free port of 127.0.0.1, and ends it. Each client asks about one of the three example pairs, again
and again: of the page it uploads it, describes it, moves the threshold and downloads the zip. Every fifth leaves while
it waits, and every tenth sends an address in place of an image. Each sentence is compared with what `kcfi caption`
writes. Prints a line of JSON: counts of what came back by status, sentences that were right and wrong, seconds that a
sentence and a refusal took, the server's memory (MiB) behind the warm-up in each quarter of the time and its slope in
the last half, and how long one more client waits when all have left.
"""

import argparse
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import kcfi
from kcfi.models import build_describer
from kcfi.processing import INSTRUCTIONS

EXAMPLE = Path(kcfi.__file__).parent / "example"
PAIRS = [[EXAMPLE / f"{name}{date}.png" for date in ("before", "after")] for name in ("", "hall_", "streets_")]
NOWHERE = "http://127.0.0.1:9/a.png"
PAUSE = 0.5  # s between two visits
LEAVES = 0.3  # s after which those leave who do not wait
PATIENCE = 300  # s that the others wait, at most


class Visitor(ABC):
    """One client after another, until the time is over.

    Args:
        address: of the server.
        number: decides which pair it asks about, and how it behaves.
        sentences: what is right, by pair.
    """

    def __init__(self, address: str, number: int, sentences: Sequence[str]) -> None:
        self.pair, self.right = PAIRS[number % len(PAIRS)], sentences[number % len(PAIRS)]
        self.leaves, self.lies = number % 5 == 0, number % 10 == 9
        self.http = httpx.Client(base_url=address, timeout=PATIENCE)
        self.seen: list[tuple[str, float]] = []  # what came back, and after how many seconds

    def stay(self, until: float) -> None:
        """Visit until a time."""
        while time.monotonic() < until:
            begun = time.monotonic()
            try:
                what = self.visit()
            except (httpx.HTTPError, ValueError) as error:
                what = "left" if self.leaves and isinstance(error, httpx.TimeoutException) else type(error).__name__
            self.seen.append((what, time.monotonic() - begun))
            time.sleep(PAUSE)

    @abstractmethod
    def visit(self) -> str:
        """Ask about the pair: a status, "right" or "wrong"."""


class ChatVisitor(Visitor):
    """A client of `kcfi serve`."""

    def __init__(self, address: str, number: int, sentences: Sequence[str]) -> None:
        super().__init__(address, number, sentences)
        sources = [f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in self.pair]
        content: list[Any] = [{"type": "image_url", "image_url": {"url": source}} for source in sources]
        if self.lies:
            content[0]["image_url"]["url"] = NOWHERE
        content.append({"type": "text", "text": INSTRUCTIONS[0]})
        self.body = {"messages": [{"role": "user", "content": content}]}

    def visit(self) -> str:
        """One request."""
        timeout = LEAVES if self.leaves else PATIENCE
        answer = self.http.post("/v1/chat/completions", json=self.body, timeout=timeout)
        if answer.status_code != 200:
            return str(answer.status_code)
        return "right" if answer.json()["choices"][0]["message"]["content"] == self.right else "wrong"


class PageVisitor(Visitor):
    """A browser at `kcfi demo`."""

    def __init__(self, address: str, number: int, sentences: Sequence[str]) -> None:
        super().__init__(address, number, sentences)
        dependencies = self.http.get("/config").json()["dependencies"]
        self.functions = {each["api_name"]: each["id"] for each in dependencies}
        self.session = ""

    def ask(self, function: str, data: list[Any]) -> Any:
        """The last message of an event, or the status with which it was refused."""
        body = {"data": data, "fn_index": self.functions[function], "session_hash": self.session}
        answer = self.http.post("/gradio_api/queue/join", json=body)
        if answer.status_code != 200:
            return str(answer.status_code)
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {"msg": ""}
                if self.leaves and function == "describe":
                    return "left"
                if message["msg"] == "process_completed":
                    return message if message["success"] else "failed"
        return "no answer"

    def visit(self) -> str:
        """Upload, describe, move the threshold, download."""
        self.session = os.urandom(6).hex()
        uploaded = self.http.post("/gradio_api/upload", files=[("files", (p.name, p.read_bytes())) for p in self.pair])
        if uploaded.status_code != 200:
            return f"upload {uploaded.status_code}"
        files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in uploaded.json()]
        if self.lies:
            files[0]["path"] = NOWHERE
        done = self.ask("describe", [*files, 0.5, True])
        if isinstance(done, str):
            return done
        shown = done["output"]["data"]
        self.ask("recolour", [None, 0.8, True])
        zipped = self.http.get(shown[2].split('href="')[1].split('"')[0]).status_code
        if zipped not in (200, 429):
            return f"zip {zipped}"
        return "right" if escape(self.right) in shown[0] else "wrong"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def memory(process: int) -> float:
    """Resident memory of a process in MiB (Linux)."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def summary(seen: Sequence[tuple[str, float]], samples: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """What clients saw and what the server took, as numbers.

    Args:
        seen: what came back, and after how many seconds.
        samples: seconds and MiB, behind the warm-up.
    """
    told: dict[str, Any] = dict(sorted(Counter(what for what, _ in seen).items()))
    for name, of in (("sentence", ("right", "wrong")), ("refusal", ("429",))):
        seconds = [spent for what, spent in seen if what in of]
        if seconds:
            told[f"{name}_s"] = {f"p{q}": round(float(np.percentile(seconds, q)), 2) for q in (50, 95, 100)}
    times, sizes = np.array(samples).T
    told["memory"] = [round(float(part.max())) for part in np.array_split(sizes, 4)]
    half = len(times) // 2
    told["mib_per_minute_in_last_half"] = round(60 * float(np.polyfit(times[half:], sizes[half:], 1)[0]), 1)
    return told


def main() -> None:
    """Start, load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", choices=["demo", "serve"])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60, help="behind the warm-up")
    parser.add_argument("--warm_up", type=float, default=30, help="seconds whose memory is not looked at")
    parser.add_argument("--model", default="kcfi-tiny")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with this script
    describer, kind = build_describer(options.model), PageVisitor if options.server == "demo" else ChatVisitor
    sentences = [describer.describe(*pair).caption for pair in PAIRS]
    del describer
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w", encoding="utf-8") as log:
        port = free_port()
        command = [sys.executable, "-m", "kcfi_cli", options.server, "--model", options.model, "--port", str(port)]
        command += ["--host", "127.0.0.1"]
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": folder})
        try:
            address = f"http://127.0.0.1:{port}"
            while True:
                try:
                    httpx.get(f"{address}/{'health' if options.server == 'serve' else ''}", timeout=PATIENCE)
                    break
                except httpx.TransportError:
                    assert server.poll() is None, Path(log.name).read_text(encoding="utf-8")[-2000:]
                    time.sleep(0.5)
            first = kind(address, 1, sentences)
            assert first.visit() == "right", "the first sentence is wrong"
            visitors = [kind(address, number, sentences) for number in range(options.clients)]
            start = time.monotonic()
            until = start + options.warm_up + options.seconds
            threads = [threading.Thread(target=visitor.stay, args=[until]) for visitor in visitors]
            for thread in threads:
                thread.start()
            samples = []
            while time.monotonic() < until:
                samples.append((time.monotonic() - start, memory(server.pid)))
                time.sleep(1)
            for thread in threads:
                thread.join()
            begun = time.monotonic()
            while first.visit() != "right" and time.monotonic() < begun + PATIENCE:
                time.sleep(PAUSE)
            settled = time.monotonic() - begun
            at_rest = memory(server.pid)
        finally:
            server.terminate()
            server.wait(60)
        left = [str(path) for path in Path(folder).rglob("kcfi-demo-*")]
    told = {"server": options.server, "clients": options.clients, "seconds": options.seconds}
    told |= summary(
        [each for visitor in visitors for each in visitor.seen], [s for s in samples if s[0] >= options.warm_up]
    )
    print(json.dumps({**told, "at_rest": round(at_rest), "one_more_s": round(settled, 1), "folders_left": len(left)}))


if __name__ == "__main__":
    main()
