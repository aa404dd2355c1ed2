"""Many clients of `kcfi demo` at once, on this machine: what they are answered, and how the server's memory grows.

    python benchmarks/demo_load.py [--clients 50] [--seconds 60] [--model kcfi-tiny]

Starts a server on a free port of 127.0.0.1. Each client uploads the example pair and describes it, moves the threshold
and downloads the zip, again and again; every fifth leaves while it waits, and every tenth sends an address in place of
an upload. Prints a line of JSON: counts of what came back, the most memory of the server (MiB) and files in its folder
in each quarter of the time, and how long one more description takes when all have left (s).
"""

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

import kcfi

EXAMPLE = Path(kcfi.__file__).parent / "example"
SETTLE = 30  # s that the server may take to forget those who left


class Visitor:
    """One client after another, until the time is over."""

    def __init__(self, address: str, number: int, counts: Counter) -> None:
        self.number, self.counts = number, counts
        self.http = httpx.Client(base_url=address, timeout=180)
        dependencies = self.http.get("/config").json()["dependencies"]
        self.functions = {each["api_name"]: each["id"] for each in dependencies}
        self.session = secrets.token_hex(6)

    def ask(self, function: str, data: list, leave: bool = False) -> dict | None:
        """The last message of an event; None if it was refused, or the client left."""
        body = {"data": data, "fn_index": self.functions[function], "session_hash": self.session}
        answer = self.http.post("/gradio_api/queue/join", json=body)
        self.counts[f"join {answer.status_code}"] += 1
        if answer.status_code != 200:
            return None
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {"msg": ""}
                if leave:
                    return None
                if message["msg"] == "process_completed":
                    self.counts["described" if message["success"] else "failed"] += function == "describe"
                    return message
        self.counts["no answer"] += 1
        return None

    def visit(self) -> None:
        """One pair."""
        self.session = secrets.token_hex(6)
        pair = [("files", (f"{date}.png", (EXAMPLE / f"{date}.png").read_bytes())) for date in ("before", "after")]
        uploaded = self.http.post("/gradio_api/upload", files=pair)
        self.counts[f"upload {uploaded.status_code}"] += 1
        files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in uploaded.json()]
        if self.number % 10 == 9:
            files[0] = {"path": "http://127.0.0.1:9/a.png", "meta": {"_type": "gradio.FileData"}}
        done = self.ask("describe", [*files, 0.5, True], leave=self.number % 5 == 0)
        if done and done["success"]:
            self.ask("recolour", [None, 0.8, True])
            link = done["output"]["data"][2].split('href="')[1].split('"')[0]
            self.counts[f"zip {self.http.get(link).status_code}"] += 1

    def stay(self, until: float) -> None:
        """Visit until a time."""
        while time.monotonic() < until:
            try:
                self.visit()
            except (httpx.HTTPError, ValueError) as error:
                self.counts[type(error).__name__] += 1
            time.sleep(0.2)


def memory(process: subprocess.Popen) -> float:
    """Resident memory of a process in MiB (Linux)."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Start, load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--model", default="kcfi-tiny")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with this script
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kcfi_cli", "demo", "--model", options.model, "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": folder})
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[0]
            counts: Counter = Counter()
            Visitor(address, 1, Counter()).visit()  # what is loaded once
            visitors = [Visitor(address, number, counts) for number in range(options.clients)]
            start = time.monotonic()
            until = start + options.seconds
            threads = [threading.Thread(target=visitor.stay, args=[until]) for visitor in visitors]
            for thread in threads:
                thread.start()
            samples = []
            while any(thread.is_alive() for thread in threads):
                files = sum(1 for path in Path(folder).rglob("*") if path.is_file())
                samples.append((memory(server), files))
                time.sleep(1)
            spent = time.monotonic() - start
            quarters = np.array_split(np.array(samples), 4)
            begun, after = time.monotonic(), Counter()
            while not after["described"] and time.monotonic() < begun + SETTLE:
                Visitor(address, 1, after).visit()
            settled = time.monotonic() - begun
        finally:
            server.terminate()
            server.wait(30)
        left = [str(path) for path in Path(folder).rglob("kcfi-demo-*")]
    print(
        json.dumps(
            {
                "clients": options.clients,
                "seconds": options.seconds,
                **dict(sorted(counts.items())),
                "until_all_left": round(spent, 1),
                "memory": [round(part[:, 0].max()) for part in quarters],
                "files": [round(part[:, 1].max()) for part in quarters],
                "one_more": round(settled, 1),
                "folders_left": len(left),
            }
        )
    )


if __name__ == "__main__":
    main()
