"""`kcfi serve` answers requests of OpenAI's chat completions with the sentences of `kcfi caption`."""

import base64
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from kcfi import KCFIConfig
from kcfi.models import load
from kcfi.processing import INSTRUCTIONS, Describer
from kcfi_cli import main

SECONDS = 120  # that a server may take to start


def forget():
    """Take the model out of the list again: users have it there in the server's process only."""
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.pop(KCFIConfig.model_type, None)
    AutoModelForMultimodalLM._model_mapping._extra_content.pop(KCFIConfig, None)


@pytest.fixture(scope="module")
def server(detector, request):
    """Address of a server of the detector, which ends with the tests."""
    if not is_serve_available():
        pytest.skip("the extra `serve` is not installed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = ["serve", "--model", str(detector), "--device", "cpu", "--port", port]
    thread = threading.Thread(target=main, args=[command], daemon=True)
    thread.start()
    address = f"http://localhost:{port}"
    request.addfinalizer(forget)
    for _ in range(10 * SECONDS):
        assert thread.is_alive(), "the server ended"
        try:
            urllib.request.urlopen(f"{address}/health").close()
            return address
        except urllib.error.URLError:
            time.sleep(0.1)
    raise TimeoutError(f"no server at {address}")


def ask(server, images, **fields):
    """Body of the answer to one message with images and the first instruction."""
    content = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "png")
        data = base64.b64encode(file.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    content.append({"type": "text", "text": INSTRUCTIONS[0]})
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 64, **fields}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return answer.read().decode()


def test_a_chat_message_with_two_images_is_answered_as_kcfi_caption_does(server, detector, make_pair):
    describer, sentences = Describer(*load(str(detector))), set()
    for pair in (make_pair(30, 20, (4, 4, 20, 16)), make_pair(30, 20)):
        (choice,) = json.loads(ask(server, pair))["choices"]
        assert choice["message"]["content"] == describer.describe(*pair).caption
        sentences.add(choice["message"]["content"])
    assert len(sentences) == 2


def test_a_streamed_answer_is_the_same_sentence_in_pieces(server, make_pair):
    pair = make_pair(30, 20, (4, 4, 20, 16))
    lines = ask(server, pair, stream=True).split("\n\n")
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines if line]
    pieces = [delta["content"] for delta in deltas if "content" in delta]
    assert len(pieces) > 1
    assert "".join(pieces) == json.loads(ask(server, pair))["choices"][0]["message"]["content"]


def test_one_image_and_another_model_are_refused(server, make_pair):
    pair = make_pair(30, 20)
    for images, fields, code in ((pair[:1], {}, 500), (pair, {"model": "another"}, 400)):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            ask(server, images, **fields)
        assert refusal.value.code == code


def test_without_the_extra_the_package_to_install_is_named(monkeypatch, capsys):
    monkeypatch.setattr("kcfi.serving.is_serve_available", lambda: False)
    assert main(["serve"]) == 2
    assert 'pip install "kcfi[serve]"' in capsys.readouterr().err


def test_a_model_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("kcfi.serving.is_serve_available", lambda: True)
    assert main(["serve", "--model", "no/such/folder"]) == 2
    assert "No model no/such/folder" in capsys.readouterr().err
