"""Files by URL."""

import errno
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from kcfi.archives.fetch import check_protocol, fetch, reason
from kcfi.processing import InputError


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Endless(Quiet):
    """Sends on and on, and does not say how much."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(1000):
            try:
                self.wfile.write(bytes(100_000))
            except OSError:
                return

    do_HEAD = do_GET


class Failing(Quiet):
    """Fails at first."""

    failures = 2

    def do_GET(self):
        if Failing.failures:
            Failing.failures -= 1
            self.send_error(503)
        else:
            super().do_GET()


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("kcfi.archives.fetch.PAUSE", 0)


@pytest.fixture
def serve(tmp_path):
    """Start an HTTP server for a folder; its URL."""
    servers = []

    def start(handler=Quiet):
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path))))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_url_becomes_a_copy_with_the_name_of_its_file(serve, tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 9000)  # of more than one chunk
    path = fetch(f"{serve()}/a.bin?key=1", tmp_path / "copies")
    assert path == tmp_path / "copies" / "a.bin" and path.read_bytes() == (tmp_path / "a.bin").read_bytes()
    with fsspec.open("memory://folder/b.bin", "wb") as file:
        file.write(b"b")
    assert fetch("memory://folder/b.bin", tmp_path / "copies").read_bytes() == b"b"


def test_a_path_is_taken_as_it_is(tmp_path):
    assert fetch("/nowhere/a.png", tmp_path / "copies") == Path("/nowhere/a.png")
    assert not (tmp_path / "copies").exists()


def test_what_is_not_there_is_named_by_its_url(serve, tmp_path):
    url = f"{serve()}/missing.png"
    with pytest.raises(ValueError, match=rf"{url}: cannot be fetched \(FileNotFoundError"):
        fetch(url, tmp_path / "copies")
    closed = "http://127.0.0.1:9/a.png"
    with pytest.raises(ValueError, match=rf"{closed}: cannot be fetched"):
        fetch(closed, tmp_path / "copies")


def test_a_file_that_says_that_it_is_too_large_is_not_fetched(serve, tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(1001))
    with pytest.raises(ValueError, match=r"a.bin: more than 1000 bytes.*--max_image_pixels"):
        fetch(f"{serve()}/a.bin", tmp_path / "copies", limit=1000)
    assert not (tmp_path / "copies" / "a.bin").exists()
    assert fetch(f"{serve()}/a.bin", tmp_path / "copies", limit=1001).stat().st_size == 1001


def test_a_file_that_does_not_say_its_size_ends_at_the_limit(serve, tmp_path):
    with pytest.raises(ValueError, match="more than 2000000 bytes"):
        fetch(f"{serve(Endless)}/a.bin", tmp_path / "copies", limit=2_000_000)
    assert (tmp_path / "copies" / "a.bin").stat().st_size < 10_000_000


def test_the_reason_of_an_error_names_the_url_and_not_its_copy(tmp_path):
    url = "https://host/images/a.png"
    error = ValueError(f"{tmp_path / 'before' / 'a.png'}: is\nbroken; /data/b.png is not")
    copies = {tmp_path / "before": url, tmp_path / "after": "/data/b.png"}
    assert reason(error, copies) == f"{url}: is broken; /data/b.png is not"


def test_protocols_are_known_or_say_which_package_is_missing():
    known = set()
    check_protocol("https://host/a.png", known)
    check_protocol("memory://a.png", known)
    assert known == {"https", "memory"}
    with pytest.raises(ValueError, match="Protocol not known: nowhere"):
        check_protocol("nowhere://a.png", known)


def test_a_server_that_gives_out_no_parts_of_files_gives_large_ones(serve, tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 50_000)  # 12.8 MB
    copy = fetch(f"{serve()}/a.bin", tmp_path / "copies")
    assert copy.read_bytes() == (tmp_path / "a.bin").read_bytes() and copy.stat().st_mtime == 0


def test_a_server_that_fails_is_asked_again(serve, tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"a")
    assert fetch(f"{serve(Failing)}/a.bin", tmp_path / "copies").read_bytes() == b"a"
    monkeypatch.setattr(Failing, "failures", 3)
    with pytest.raises(ValueError, match=r"cannot be fetched .*503"):
        fetch(f"{serve(Failing)}/a.bin", tmp_path / "copies")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.ESTALE, "stale"), MemoryError()])
def test_a_machine_at_its_end_is_no_bad_pair(error, tmp_path, monkeypatch):
    refused = InputError("cannot be read")
    refused.__cause__ = error
    with pytest.raises(type(error)):
        reason(refused, {})

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(fsspec, "url_to_fs", fail)
    with pytest.raises(type(error)):
        fetch("memory://a.png", tmp_path)
