"""What gets through to Gradio, by requests to a running server; each refusal has its status and one sentence."""

import json
import socket
import time
import urllib.parse

import pytest
from PIL import Image

from kcfi.demo.guard import FILES

EVENT = {"meta": {"_type": "gradio.FileData"}}


def sentence(answer):
    """The message of a refusal."""
    told = answer.json()["detail"]
    assert told.endswith(".") and "Traceback" not in told
    return told


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/monitoring",
        "/monitoring",
        "/gradio_api/vibe-code",
        "/gradio_api/runs",
        "/gradio_api/deep_link",
        "/gradio_api/queue/status",
        "/gradio_api/custom_component/a/b/c/d",
        "/docs",
        "/openapi.json",
        "/login",
        "/pwa_icon",
        "/examples",
        "/nothing",
    ],
)
def test_only_what_the_page_needs_can_be_asked(client, path):
    answer = client.http.get(path)
    assert answer.status_code == 404 and sentence(answer)


@pytest.mark.parametrize(
    "path",
    ["run/describe", "api/describe", "call/describe", "call/v2/describe", "component_server", "process_recording"],
)
def test_functions_are_reached_through_the_queue_alone(client, path):
    answer = client.http.post(f"/gradio_api/{path}", json={"data": [None, None, 0.5, True], "session_hash": "a"})
    assert answer.status_code == 404
    assert client.http.put("/gradio_api/upload").status_code == 404


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "http://127.0.0.1:1/a.png", "file:///etc/passwd", "../../../etc/passwd", "setup.cfg"]
)
def test_no_file_of_the_server_and_no_address_is_sent(client, path):
    for start in ("/gradio_api/file=", "/gradio_api/file/"):
        for quoted in (path, urllib.parse.quote(path, safe="")):
            assert client.http.get(start + quoted).status_code in (403, 404)
    assert b"root:" not in client.http.get(f"/gradio_api/file={path}").content


def test_what_was_uploaded_is_sent_back(client):
    [file] = client.upload(Image.new("RGB", (5, 5), "red"))
    answer = client.http.get(f"/gradio_api/file={file['path']}")
    assert answer.status_code == 200 and answer.content.startswith(b"\x89PNG")


@pytest.fixture
def listener():
    """A server that counts who connects, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        yield server, f"http://127.0.0.1:{server.getsockname()[1]}/a.png"


def nobody_connected(server):
    with pytest.raises(TimeoutError):
        server.accept()
    return True


@pytest.mark.parametrize("place", ["before", "after"])
def test_an_address_is_never_fetched(client, listener, place):
    server, address = listener
    [file] = client.upload(Image.new("RGB", (5, 5)))
    for evil in ({"path": address, **EVENT}, {"path": address, "url": address}, {"url": address}):
        data = [evil, file, 0.5, True] if place == "before" else [file, evil, 0.5, True]
        answer = client.join("describe", data)
        assert answer.status_code == 403 and "uploaded" in sentence(answer)
    assert client.http.get(f"/gradio_api/file={address}").status_code == 403
    assert nobody_connected(server)


@pytest.mark.parametrize(
    "value",
    [
        {"path": "/etc/passwd", **EVENT},
        {"path": "/etc/passwd"},
        {"path": None, "url": "data:image/png;base64,AAAA"},
        {"deep": [{"deeper": {"path": "/etc/passwd"}}]},
        [[["x", {"path": "https://127.0.0.1/a.png"}]]],
    ],
)
@pytest.mark.parametrize("function", ["describe", "recolour", "describe_scene"])
def test_paths_of_the_server_are_refused_wherever_they_stand(client, function, value):
    answer = client.join(function, [value, value, 0.5, True])
    assert answer.status_code == 403 and "uploaded" in sentence(answer)


def test_data_in_a_request_is_refused_beside_an_upload(client):
    [file] = client.upload(Image.new("RGB", (5, 5)))
    answer = client.join("describe", [{**file, "url": "data:image/png;base64,AAAA"}, file, 0.5, True])
    assert answer.status_code == 403 and "Upload images" in sentence(answer)


def test_files_that_are_no_images_and_large_ones_are_refused_before_anything_decodes_them(client):
    [good, text] = [*client.upload(Image.new("RGB", (5, 5))), *client.upload(b"<VRTDataset/>", name="a.tif")]
    assert client.join("describe", [good, text, 0.5, True]).status_code == 415
    assert client.join("describe_scene", [text, good]).status_code == 415
    [large] = client.upload(Image.new("L", (3000, 2000)))
    answer = client.join("describe", [good, large, 0.5, True])
    assert answer.status_code == 413 and "3,000 x 2,000 px" in sentence(answer) and "5 Mpx" in sentence(answer)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 90_000])
def test_what_is_no_json_is_refused(client, body):
    answer = client.http.post("/gradio_api/queue/join", content=body)
    assert answer.status_code == 400 and sentence(answer)


def test_too_many_bytes_are_refused(serving):
    with serving(megabytes=0.1) as client:
        assert client.upload(bytes(90_000))
        for size in (150_000, 5_000_000):
            answer = client.http.post("/gradio_api/upload", files=[("files", ("a.png", bytes(size)))])
            assert answer.status_code == 413 and "larger than 0.11 MB" in sentence(answer)
        two = client.http.post("/gradio_api/upload", files=[("files", (n, bytes(80_000))) for n in "ab"])
        assert two.status_code == 413
        event = client.join("describe", ["x" * 200_000, None, 0.5, True])
        assert event.status_code == 413


def test_a_file_of_all_the_bytes_of_a_request_is_taken(serving):
    """Failed before: Gradio refused it, in words that are no JSON; larger uploads, too, by how their bytes came."""
    with serving(megabytes=0.1) as client:
        assert client.upload(bytes(105_000))


def test_too_many_bytes_are_refused_though_nobody_said_how_many_come(serving):
    def parts():
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        for _ in range(100):
            yield bytes(50_000)

    with serving(megabytes=0.1) as client:
        answer = client.http.post(
            "/gradio_api/upload", content=parts(), headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert answer.status_code == 413 and "larger than" in sentence(answer)


def test_more_files_than_a_page_sends_are_refused_though_they_are_small(client):
    few = [("files", (f"{number}.png", b"x")) for number in range(FILES)]
    assert len(client.http.post("/gradio_api/upload", files=few).json()) == FILES
    before = set(loose(client))
    many = client.http.post("/gradio_api/upload", files=[*few, ("files", ("more.png", b"x"))])
    assert many.status_code == 413 and f"More than {FILES} files" in sentence(many)
    until(lambda: not set(loose(client)) - before)


def test_files_are_counted_though_their_borders_come_in_pieces(client):
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n1\r\n'
    whole = part * (FILES + 1) + b"--x--\r\n"
    content = (whole[place : place + 1] for place in range(len(whole)))
    answer = client.http.post(
        "/gradio_api/upload", content=content, headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert answer.status_code == 413 and "More than" in sentence(answer)


def test_files_are_counted_though_a_second_header_names_another_border(client):
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n1\r\n'
    kinds = [("content-type", f"multipart/form-data; boundary={border}") for border in ("x", "another")]
    answer = client.http.post("/gradio_api/upload", content=part * (FILES + 1) + b"--x--\r\n", headers=kinds)
    assert answer.status_code == 413 and "More than" in sentence(answer)


def test_a_full_queue_is_told(serving, make_pair):
    with serving(waiting=2, megapixels=9) as client:
        large = make_pair(1500, 1500, (0, 0, 700, 700))
        data = [*client.upload(*large), 0.5, True]
        answers = [client.join("describe", data, session=f"s{number}") for number in range(6)]
        codes = [answer.status_code for answer in answers]
        assert codes[0] == 200 and codes[-1] == 429 and set(codes) == {200, 429}
        assert "waiting" in sentence(answers[-1])


def test_a_client_that_leaves_frees_its_place(serving, make_pair):
    with serving(megapixels=9, waiting=4) as client:
        data = [*client.upload(*make_pair(2900, 2900, (0, 0, 900, 900))), 0.5, True]
        assert client.join("describe", data, session="leaver").status_code == 200
        messages = client.listen("leaver")
        while next(messages)["msg"] != "process_starts":
            pass
        messages.close()  # the connection
        start = time.monotonic()
        done = client.describe(*make_pair(20, 20))
        waited = time.monotonic() - start
        assert len(done) == 4 and waited < 15, waited
        assert "leaver" not in client.guard.runs.listening


def test_browsers_are_told_to_stay_here(client):
    for path in ("/", "/config", "/gradio_api/info", "/nothing"):
        headers = client.http.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy and "http" not in policy and "connect-src 'self'" in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_the_page_names_no_other_host(client):
    page, config = client.http.get("/").text, json.dumps(client.http.get("/config").json())
    assert "googleapis" not in page + config and "cdn" not in page.lower()
    assert '"analytics_enabled": true' not in config


def loose(client):
    """Files that lie in the folder of uploads and belong to nobody."""
    return [path for path in (client.folder / "uploads").iterdir() if path.is_file()]


def until(true):
    """Wait for something that happens behind an answer."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < 10
        time.sleep(0.05)


def test_nothing_is_left_of_uploads_that_are_refused_or_break_off(serving):
    start = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(70_000)
    head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    with serving(megabytes=0.1) as client:
        refused = client.http.post(
            "/gradio_api/upload",
            content=iter([start, bytes(70_000)]),
            headers={"content-type": "multipart/form-data; boundary=x"},
        )
        assert refused.status_code == 413 and "larger than" in sentence(refused) and loose(client) == []
        url = client.http.base_url
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(head + b"Content-Length: 90000\r\n\r\n" + start)
            until(lambda: loose(client))
        until(lambda: not loose(client))


def test_a_request_that_comes_too_slowly_is_refused(serving, monkeypatch):
    monkeypatch.setattr("kcfi.web.guard.RECEIVED", 0.5)
    with serving() as client:
        url = client.http.base_url
        with socket.create_connection((url.host, url.port)) as connection:
            connection.settimeout(10)
            connection.sendall(b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            assert b"408" in connection.recv(1000)


@pytest.mark.parametrize("query", ["", "session_hash=a&session_hash=b", "session_hash=&session_hash=b"])
def test_a_stream_is_of_one_session(client, query):
    answer = client.http.get(f"/gradio_api/queue/data?{query}")
    assert answer.status_code == 400 and "one session" in sentence(answer)
