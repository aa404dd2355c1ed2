"""Starting, downloads, and what a server leaves behind: nothing."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest
from PIL import Image

from kcfi.demo import answers
from kcfi.demo.limits import Limits
from kcfi.demo.server import TIDIED, ZIPS, build_app, serve
from kcfi.models import load
from kcfi.processing import Describer, InputError
from kcfi_cli import build_parser, main
from tests.kcfi.demo.conftest import Client, png

ROOT = Path(__file__).parents[3]
WATCHED = """
import sys
def watch(event, values):
    if event == "socket.connect" and values[1][0] not in ("127.0.0.1", "::1") or event == "socket.getaddrinfo":
        print("asked", event, values[1] if event == "socket.connect" else values[0], file=sys.stderr, flush=True)
sys.addaudithook(watch)
from kcfi_cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_zip_of_an_answer_has_the_threshold_of_its_link(client, make_pair):
    shown = client.describe(*make_pair(40, 40, (0, 0, 20, 40)), threshold=0.35)
    link = re.search(r'href="([^"]+)"', shown[2])[1]
    answer = client.http.get(link)
    assert (
        answer.headers["content-type"] == "application/zip" and "attachment" in answer.headers["content-disposition"]
    )
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert b'"threshold": 0.35' in archive.read("answer.json")


@pytest.mark.parametrize("threshold", ["nan", "-0.1", "1.1", "inf"])
def test_a_threshold_is_a_probability(client, threshold):
    assert client.http.get(f"/answers/x.zip?threshold={threshold}").status_code == 422


def test_zips_are_made_a_few_at_a_time_and_nothing_is_left_of_them(client, make_pair, monkeypatch):
    link = re.search(r'href="([^"]+)"', client.describe(*make_pair(40, 40))[2])[1]
    going, write = threading.Event(), answers.write_zip

    def slowly(*given):
        assert going.wait(30)
        write(*given)

    monkeypatch.setattr(answers, "write_zip", slowly)
    with ThreadPoolExecutor(ZIPS + 1) as pool:
        asked = [pool.submit(client.http.get, link) for _ in range(ZIPS + 1)]
        first = next(as_completed(asked)).result()
        assert first.status_code == 429 and "Try again" in first.json()["detail"]
        going.set()
        assert sorted(each.result().status_code for each in asked) == [200] * ZIPS + [429]
    start = time.monotonic()
    while any(path.is_file() for path in (client.folder / "uploads").iterdir()):
        assert time.monotonic() - start < 10
        time.sleep(0.05)


def test_a_zip_that_is_deleted_while_it_is_sent_is_sent(client, make_pair, monkeypatch):
    link = re.search(r'href="([^"]+)"', client.describe(*make_pair(40, 40))[2])[1]
    content = os.urandom(1 << 24)  # more than the network holds
    monkeypatch.setattr(answers, "write_zip", lambda kept, threshold, file: file.write(content))
    with client.http.stream("GET", link) as answer:
        parts = answer.iter_bytes()
        came = next(parts)
        [file] = [path for path in (client.folder / "uploads").iterdir() if path.is_file()]
        file.unlink()  # as `sweep` does
        came += b"".join(parts)
    assert answer.status_code == 200 and came == content


def test_free_memory_is_given_back_though_nobody_asks(serving, monkeypatch):
    given = threading.Event()
    monkeypatch.setattr("kcfi.demo.server.give_back", given.set)
    with serving():
        assert given.wait(60)


def test_what_is_too_old_is_deleted_though_nobody_asks(serving, make_pair):
    with serving(stored_seconds=2) as client:
        link = re.search(r'href="([^"]+)"', client.describe(*make_pair(40, 40))[2])[1]
        start = time.monotonic()
        while list((client.folder / "uploads").glob("*/*")):
            assert time.monotonic() - start < 20
            time.sleep(0.2)
        time.sleep(TIDIED)
        assert client.http.get(link).status_code == 404


@pytest.mark.parametrize("path", ["/answers/none.zip", "/scenes/none.zip", "/scenes/none/report.html"])
def test_what_is_not_kept_is_not_there(client, path):
    answer = client.http.get(path)
    assert answer.status_code == 404 and "no longer kept" in answer.json()["detail"]


def test_the_examples_are_pictures_and_no_way_out(client):
    assert client.http.get("/examples/hall_after.png").content.startswith(b"\x89PNG")
    for path in ("/examples/../models.py", "/examples/%2e%2e/models.py", "/examples/..%2fmodels.py"):
        assert client.http.get(path).status_code == 404


def test_a_model_without_a_head_is_refused(make_detector, tmp_path):
    model = make_detector(tmp_path / "model", use_change_detection_head=False)
    with pytest.raises(InputError, match="no change detection head"):
        build_app(Describer(*load(str(model))), "x", Limits(), tmp_path)


def test_a_port_that_is_taken_is_one_line(detector):
    describer = Describer(*load(str(detector)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"Cannot serve on 127.0.0.1, port {port} \(.*\): choose another --port"):
            serve(describer, "x", "127.0.0.1", port, Limits())
    with pytest.raises(InputError, match="port 70000"):
        serve(describer, "x", "127.0.0.1", 70000, Limits())


def test_the_command_has_the_limits_of_the_page():
    options = build_parser().parse_args(["demo"])
    given = {name: getattr(options, f"max_{name}") for name in ("megabytes", "megapixels", "waiting", "seconds")}
    assert Limits(**given) == Limits() and options.host == "127.0.0.1"


@pytest.mark.parametrize("option", ["megabytes", "megapixels", "waiting", "seconds"])
def test_a_limit_of_nothing_is_refused(option, capsys):
    assert main(["demo", f"--max_{option}", "0"]) == 2
    assert f"--max_{option} 0 must be above 0" in capsys.readouterr().err


def test_a_limit_without_end_is_refused(capsys):
    assert main(["demo", "--max_megabytes", "inf"]) == 2
    assert "--max_megabytes inf must be above 0 and finite" in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_server_asks_nobody_anything_and_leaves_nothing(detector, tmp_path, how):
    command = [sys.executable, "-c", WATCHED, "demo", "--model", str(detector), "--device", "cpu", "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("GRADIO_TEMP_DIR", None)
    environment.pop("HF_HUB_OFFLINE", None)  # also where the network is allowed
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        address = process.stdout.readline().split()[0]
        folders = list(tmp_path.glob("kcfi-demo-*"))
        client = Client(address, None, folders[0])
        pair = [png(Image.new("RGB", (20, 20), colour)) for colour in ("black", "white")]
        assert "sentence" in client.describe(*pair)[0]
        process.send_signal(how)
        process.wait(30)
    assert len(folders) == 1 and not folders[0].exists()
    assert "asked" not in (tmp_path / "log").read_text()
