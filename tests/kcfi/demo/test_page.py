"""What the buttons do, by events as a browser sends them."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from kcfi.demo.page import EXAMPLES, PAIRS
from kcfi.models import load
from kcfi.pictures import overlay
from kcfi.processing import Describer
from tests.kcfi.demo.conftest import Client


def name_of(shown):
    """The answer's name, from the link of the zip."""
    return re.search(r"/answers/([\w-]+)\.zip\?threshold=([\d.]+)", shown[2]).groups()


def image(client, shown, number):
    """A picture of the slider, as the browser gets it."""
    answer = client.http.get(shown[1][number]["url"])
    assert answer.status_code == 200
    path = client.folder / "shown"
    path.write_bytes(answer.content)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_a_pair_is_described_as_kcfi_caption_does_and_shown_with_its_mask(client, detector):
    pair = [Image.new("RGB", (64, 64), (90, 90, 90)) for _ in range(2)]
    pair[1].paste((250, 250, 250), (0, 0, 32, 64))
    report = Describer(*load(str(detector), device="cpu")).describe(*pair)
    shown = client.describe(*pair)
    assert f'<p class="sentence">{report.caption}</p>' in shown[0]
    assert f"{(report.mask == 2).sum():,}" in shown[2] and name_of(shown)[1] == "0.5"
    before, after = (image(client, shown, number) for number in (0, 1))
    assert np.abs(before - 90).max() < 8  # WebP
    expected = np.asarray(overlay(pair[1], report.mask)).astype(int)
    assert np.abs(after - expected).mean() < 4 and np.abs(np.asarray(pair[1]).astype(int) - expected).mean() > 20
    unmasked = client.describe(*pair, masked=False)
    assert np.abs(image(client, unmasked, 1) - np.asarray(pair[1])).mean() < 4


def test_another_threshold_recolours_without_the_model(client, make_pair):
    shown = client.describe(*make_pair(64, 64, (0, 0, 32, 64)))
    calls = []
    hooks = [part.register_forward_hook(lambda *_: calls.append(1)) for part in client.guard.runs.parts]
    name = name_of(shown)[0]
    counts = {}
    for threshold, masked in ((0.05, True), (0.95, True), (0.95, False)):
        # the state of the page is the server's: a browser sends nothing in its place
        done = client.ask("recolour", [None, threshold, masked])
        again = [None, *done["output"]["data"]]
        assert name_of(again) == (name, f"{threshold:g}")
        counts[threshold] = int(re.findall(r"<td>([\d,]+)</td>", again[2])[1].replace(",", ""))
    for hook in hooks:
        hook.remove()
    assert calls == [] and counts[0.05] > counts[0.95]


def test_an_answer_that_is_gone_changes_nothing_and_says_so(serving, make_pair):
    with serving(answer_megabytes=0.01) as client:  # room for one answer of 6,400 bytes
        client.describe(*make_pair(20, 20))
        other = Client(client.address, client.guard, client.folder)
        assert "sentence" in other.describe(*make_pair(20, 20))[0]
        client.join("recolour", [None, 0.5, True])
        messages = list(client.listen())
        assert any("no longer kept" in message.get("log", "") for message in messages)
        [done] = [message for message in messages if message["msg"] == "process_completed"]
        assert done["success"] and "answers/" not in json.dumps(done["output"]["data"])


def test_a_missing_image_is_told(client):
    done = client.ask("describe", [None, None, 0.5, True])
    assert not done["success"] and done["output"]["error"] == "Give both images, the earlier and the later one."


def test_a_message_names_the_files_without_folders_and_is_text(client, make_pair):
    [small] = client.upload(make_pair(20, 20)[0], name="a<b>bold.png")
    [large] = client.upload(make_pair(30, 20)[0], name="c&d.png")
    error = client.ask("describe", [small, large, 0.5, True])["output"]["error"]
    assert "20 x 20 px" in error and "30 x 20 px" in error
    assert str(client.folder) not in error and "uploads" not in error and "<b>" not in error


def test_a_run_that_takes_too_long_is_told_with_its_status(serving, make_pair):
    with serving(seconds=0.05) as client:
        error = client.describe(*make_pair(400, 400))
        assert "longer than the 0.05 s" in error and error.endswith("(error 504)")


def test_bugs_are_not_told_to_strangers(client, make_pair, capfd):
    def fail(*_):
        raise RuntimeError("a secret")

    hook = client.guard.runs.parts[0].register_forward_pre_hook(fail)
    told = client.describe(*make_pair(20, 20))
    hook.remove()
    assert told is None and "a secret" in capfd.readouterr().err
    assert "sentence" in client.describe(*make_pair(20, 20))[0]


def test_the_name_of_the_model_is_text(client):
    config = json.dumps(client.http.get("/config").json())
    assert "a &lt;b&gt;model&lt;/b&gt;" in config and "a <b>model" not in config


@pytest.mark.parametrize("name", PAIRS)
def test_the_example_pairs_are_there_with_their_credits(name):
    sizes = {Image.open(EXAMPLES / f"{name}{date}.png").size for date in ("before", "after")}
    assert sizes == {(256, 256)}
    assert f"{name}before.png" in (EXAMPLES / "CREDITS.txt").read_text(encoding="utf-8")
