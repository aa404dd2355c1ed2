"""`kcfi serve` answers requests of OpenAI's chat completions as `kcfi caption` does, and nothing else."""

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from kcfi import KCFIConfig
from kcfi.models import load
from kcfi.processing import INSTRUCTIONS, Describer
from kcfi_cli import main

SECONDS = 120  # that a server may take to start, or to answer
CHAT = "/v1/chat/completions"


def forget():
    """Take the model out of the list again: users have it there in the server's process only."""
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.pop(KCFIConfig.model_type, None)
    AutoModelForMultimodalLM._model_mapping._extra_content.pop(KCFIConfig, None)


@pytest.fixture(scope="module")
def guards():
    """The guards of the servers that were started, in their order."""
    from kcfi.web.chat_guard import ChatGuard

    found, build = [], ChatGuard.__init__

    def remember(guard, *args):
        build(guard, *args)
        found.append(guard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChatGuard, "__init__", remember)
        yield found


@pytest.fixture(scope="module")
def server(detector, request, guards):
    """A client of a server of the detector, which ends with the tests; 2 runs may wait, of 1 Mpx and 0.1 MB."""
    if not is_serve_available():
        pytest.skip("the extra `serve` is not installed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    limits = ["--max_waiting", "2", "--max_megapixels", "1", "--max_megabytes", "0.1"]
    command = ["serve", "--model", str(detector), "--device", "cpu", "--port", port, *limits]
    thread = threading.Thread(target=main, args=[command], daemon=True)
    thread.start()
    client = httpx.Client(base_url=f"http://localhost:{port}", timeout=SECONDS)
    request.addfinalizer(forget)
    for _ in range(10 * SECONDS):
        assert thread.is_alive(), "the server ended"
        try:
            assert client.get("/health").status_code == 200
            return client
        except httpx.TransportError:
            time.sleep(0.1)
    raise TimeoutError(f"no server at {client.base_url}")


@pytest.fixture
def guard(server, guards):
    """Its guard, whose limits are put back."""
    [guard] = guards
    limits = guard.limits
    yield guard
    guard.limits = limits


def url(image):
    """A data URL of an image, or of bytes."""
    file = io.BytesIO()
    if isinstance(image, bytes):
        file.write(image)
    else:
        image.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def body(sources, **fields):
    """A request with these images and the first instruction."""
    content = [{"type": "image_url", "image_url": {"url": source}} for source in sources]
    content.append({"type": "text", "text": INSTRUCTIONS[0]})
    return {"messages": [{"role": "user", "content": content}], **fields}


def ask(server, images, **fields):
    return server.post(CHAT, json=body([url(image) for image in images], **fields))


def sentence(answer, status):
    """What is told by a refusal."""
    assert answer.status_code == status, answer.text
    told = answer.json()["error"]
    assert told.endswith(".") and "Traceback" not in told
    return told


@contextmanager
def slow(guard, seconds):
    """The model takes so long for each word; the context is an event that is set when it has begun."""
    begun = threading.Event()

    def wait(*_):
        begun.set()
        time.sleep(seconds)

    hook = guard.parts[1].register_forward_hook(wait)
    try:
        yield begun
    finally:
        hook.remove()


def until(true):
    """Wait for what happens behind an answer."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < SECONDS
        time.sleep(0.02)


def test_a_chat_message_with_two_images_is_answered_as_kcfi_caption_does(server, detector, make_pair):
    describer, sentences = Describer(*load(str(detector))), set()
    for pair in (make_pair(30, 20, (4, 4, 20, 16)), make_pair(30, 20)):
        answer = ask(server, pair)
        (choice,) = answer.json()["choices"]
        assert choice["message"]["content"] == describer.describe(*pair).caption
        sentences.add(choice["message"]["content"])
    assert len(sentences) == 2


def test_a_streamed_answer_is_the_same_sentence_in_pieces(server, make_pair):
    pair = make_pair(30, 20, (4, 4, 20, 16))
    lines = ask(server, pair, stream=True).text.split("\n\n")
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines if line]
    pieces = [delta["content"] for delta in deltas if "content" in delta]
    assert len(pieces) > 1
    assert "".join(pieces) == ask(server, pair).json()["choices"][0]["message"]["content"]


def test_the_model_has_the_name_of_its_folder_and_nobody_is_told_where_that_lies(server, detector, make_pair):
    pair = make_pair(30, 20)
    for name in (detector.name, str(detector), None):
        answer = ask(server, pair, model=name)
        assert answer.json()["model"] == f"{detector.name}@main" and str(detector) not in answer.text
    [listed] = server.get("/v1/models").json()["data"]
    assert listed["id"] == detector.name
    assert f"'{detector.name}'" in sentence(ask(server, pair, model="another"), 400)


def test_an_answer_is_no_page(server, make_pair):
    answer = ask(server, make_pair(30, 20))
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_images_than_two_is_refused(server, make_pair, count):
    images = [*make_pair(30, 20), *make_pair(30, 20)][:count]
    told = sentence(ask(server, images), 400)
    assert f"this message has {count}" in told and "the earlier one first" in told


@contextmanager
def listener():
    """A server that nobody should ask, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        yield f"http://127.0.0.1:{server.getsockname()[1]}/a.png"
        with pytest.raises(TimeoutError):
            server.accept()


def test_nothing_is_fetched_and_no_file_of_the_server_is_read(server, make_pair, tmp_path):
    first, second = make_pair(30, 20)
    file = tmp_path / "a.png"
    second.save(file)
    bare = url(second).partition(",")[2]  # which transformers reads, too
    with listener() as address:
        for source in (address, address.replace("http", "https"), f"file://{file}", str(file), bare, None, 7):
            for pair in ([source, url(first)], [url(first), source]):
                assert "Nothing is fetched" in sentence(server.post(CHAT, json=body(pair)), 400)
        for part in (
            {"type": "image", "url": address},
            {"type": "video_url", "video_url": {"url": address}},
            {"type": "audio_url", "audio_url": {"url": address}},
            {"type": "input_image", "image_url": address},
        ):
            request = body([url(first), url(second)])
            request["messages"][0]["content"].append(part)
            assert "no other is taken" in sentence(server.post(CHAT, json=request), 400)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/systemone"),
        ("POST", "/v1/audio/transcriptions"),
        ("POST", "/load_model"),
        ("POST", "/reset"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("PUT", CHAT),
    ],
)
def test_whatever_else_the_server_of_transformers_can_do_is_not_there(server, method, path):
    assert "nothing of that name" in sentence(server.request(method, path, json={"model": "me/other"}), 404)


def test_a_template_or_settings_of_a_request_are_refused(server, make_pair):
    for field in ("chat_template_kwargs", "generation_config", "tools", "logit_bias", "stop", "n"):
        assert f"'{field}'" in sentence(ask(server, make_pair(30, 20), **{field: {}}), 400)


def test_too_many_bytes_and_pixels_are_refused_before_they_are_read(server, make_pair):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8))
    assert "larger than 0.1 MB" in sentence(ask(server, [noise, noise]), 413)
    whole = json.dumps(body([url(noise)] * 2)).encode()
    json_type = {"content-type": "application/json"}
    told = server.post(CHAT, content=iter([whole[:90_000], whole[90_000:]]), headers=json_type)  # nobody says how many
    assert "larger than 0.1 MB" in sentence(told, 413)
    assert "2,000 x 600 px" in sentence(ask(server, [Image.new("L", (2000, 600))] * 2), 413)
    content = b"IHDR" + struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT"
    assert "pixels" in sentence(ask(server, [make_pair(9, 9)[0], bomb]), 413)


def test_a_request_of_another_kind_than_json_is_refused(server):
    """A page of a stranger could let a browser send plain text here."""
    answer = server.post(CHAT, content=b"{}", headers={"content-type": "text/plain"})
    assert "application/json" in sentence(answer, 415)


def test_a_full_queue_is_told_and_all_that_were_admitted_are_answered(server, guard, make_pair):
    pair = make_pair(30, 20, (4, 4, 20, 16))
    right = ask(server, pair).json()["choices"][0]["message"]["content"]
    with slow(guard, 0.05) as begun, ThreadPoolExecutor(9) as pool:
        first = pool.submit(ask, server, pair)
        assert begun.wait(SECONDS)
        answers = [each.result() for each in [pool.submit(ask, server, pair) for _ in range(8)]]
        answers.append(first.result())
    told = [answer for answer in answers if answer.status_code != 200]
    assert len(answers) - len(told) >= 3  # one that is computed and two that wait; more, as these are answered
    assert len(told) >= 1 and all("waiting" in sentence(answer, 429) for answer in told)
    done = [answer.json()["choices"][0]["message"]["content"] for answer in answers if answer.status_code == 200]
    assert set(done) == {right}
    until(lambda: guard.places == 3)


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_that_takes_too_long_is_ended(server, guard, make_pair, stream):
    guard.limits = type(guard.limits)(seconds=0.2)
    with slow(guard, 0.1):
        start = time.monotonic()
        answer = ask(server, make_pair(30, 20), stream=stream)
    if stream:  # it began with 200
        told = json.loads(answer.text.split("\n\n")[-2].removeprefix("data: "))["error"]
    else:
        told = sentence(answer, 504)
    assert "longer than the 0.2 s" in told and time.monotonic() - start < 6  # 64 words would take 6.4 s
    until(lambda: guard.places == 3)


def connection(server, sources, **fields):
    """A request that was sent, whose answer nobody has read."""
    content = json.dumps(body(sources, **fields)).encode()
    opened = socket.create_connection((server.base_url.host, server.base_url.port))
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    opened.sendall(head.encode() + content)
    return opened


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_answer_is_computed_frees_its_place(server, guard, make_pair, stream):
    pair = make_pair(30, 20)
    with slow(guard, 0.2) as begun:  # 12.8 s for 64 words
        opened = connection(server, [url(image) for image in pair], stream=stream)
        assert begun.wait(SECONDS) and guard.places == 2
        start = time.monotonic()
        opened.close()
        until(lambda: guard.places == 3)
        assert time.monotonic() - start < 5
    assert not guard.computing.locked() and ask(server, pair).status_code == 200


def test_a_client_that_leaves_while_it_waits_frees_its_place_at_once(server, guard, make_pair):
    sources = [url(image) for image in make_pair(30, 20)]
    with slow(guard, 0.05) as begun:
        computed = connection(server, sources)
        assert begun.wait(SECONDS)
        waiting = connection(server, sources)
        until(lambda: guard.places == 1)
        waiting.close()
        until(lambda: guard.places == 2)
        assert guard.computing.locked()  # by the first one, which is answered
        assert b"200 OK" in computed.recv(1000)
        computed.close()
    until(lambda: guard.places == 3)


def drip(server):
    """A request that begins and does not end."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n{{"
    opened = socket.create_connection((server.base_url.host, server.base_url.port))
    opened.sendall(head.encode())
    return opened


def test_clients_that_send_a_byte_at_a_time_hold_up_nobody_and_make_room(server, guard, make_pair):
    """Failed before: three of them, for as many places, shut the server for 300 s."""
    from kcfi.web.guard import COMING

    with ExitStack() as stack:
        slow = [stack.enter_context(drip(server)) for _ in range(COMING)]
        until(lambda: len(guard.coming) == COMING)
        for each in slow:
            each.sendall(b" ")
        assert ask(server, make_pair(30, 20)).status_code == 200
        assert slow[0].recv(1000).startswith(b"HTTP/1.1 408")
        assert len(guard.coming) == COMING - 1
    until(lambda: not guard.coming and guard.places == 3)


def test_a_client_that_leaves_while_it_sends_makes_room(server, guard):
    with drip(server):
        until(lambda: guard.coming)
    until(lambda: not guard.coming)


def test_without_the_extra_the_package_to_install_is_named(monkeypatch, capsys):
    monkeypatch.setattr("kcfi.serving.is_serve_available", lambda: False)
    assert main(["serve"]) == 2
    assert 'pip install "kcfi[serve]"' in capsys.readouterr().err


def test_a_model_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("kcfi.serving.is_serve_available", lambda: True)
    assert main(["serve", "--model", "no/such/folder"]) == 2
    assert "No model no/such/folder" in capsys.readouterr().err


def test_a_limit_of_nothing_is_refused(capsys):
    assert main(["serve", "--max_waiting", "0"]) == 2
    assert "--max_waiting 0 must be above 0" in capsys.readouterr().err
