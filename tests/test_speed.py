"""`--speed`: the vision tower in OpenVINO gives the same reports, and starts only where it pays."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import kcfi.speed
from kcfi.models import build_describer, load
from kcfi.processing import Describer
from kcfi.speed import FILE, NEEDED, FastTower, difference, keep_tower, speed_up, tower_key
from kcfi_cli import main

# looked for, not imported: OpenVINO itself would tell its maker
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = pytest.mark.skipif(MISSING != [], reason="the extra `fast` is not installed")


@pytest.fixture(scope="module")
def kept(detector, tmp_path_factory):
    """A folder that holds the exported tower of the tiny detector."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kcfi.speed, "KEPT", folder)
        model = load(str(detector))[0]
        keep_tower(model, folder / tower_key(model) / FILE)
    return folder


@pytest.fixture
def there(kept, monkeypatch):
    monkeypatch.setattr(kcfi.speed, "KEPT", kept)
    return kept


@pytest.fixture
def nothing(tmp_path, monkeypatch):
    """Nothing is kept, and an export would be noticed."""
    exported = []
    monkeypatch.setattr(kcfi.speed, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(kcfi.speed, "export_tower", lambda model, path: exported.append(path))
    return exported


def is_fast(describer):
    return isinstance(describer.encode, FastTower)


def test_reports_are_those_of_torch(detector, there, make_pair):
    plain, fast = (build_describer(str(detector), "cpu", speed=speed) for speed in ("plain", "exact"))
    pairs = [tuple(make_pair(side, side, square=(8, 8, 24, 24))) for side in (32, 32, 32, 72)]
    assert is_fast(fast) and not is_fast(plain)
    for one, other in zip(*(each.describe_pairs(pairs, regions=True) for each in (plain, fast)), strict=True):
        assert one.caption == other.caption and one.mask.any() and np.array_equal(one.mask, other.mask)
        assert [region.caption for region in one.regions] == [region.caption for region in other.regions]
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)
        np.testing.assert_allclose(one.key_changes, other.key_changes, atol=1e-4)


def test_stages_are_projected_behind_a_fast_tower(make_detector, tmp_path, make_pair, monkeypatch):
    monkeypatch.setattr(kcfi.speed, "KEPT", tmp_path / "kept")
    folder = str(make_detector(tmp_path / "model", stage_projection_size=6))
    plain, fast = (build_describer(folder, "cpu", speed=speed) for speed in ("plain", "exact"))
    pairs = [tuple(make_pair(32, 32, square=(8, 8, 24, 24)))]
    with torch.no_grad():
        found, expected = fast._stages(pairs, as_trained=True), plain._stages(pairs, as_trained=True)
    assert is_fast(fast) and found[1][0].shape[1] == 6
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


LEFT_IN_A_THREAD = """
import gc, os, signal, sys, threading
from pathlib import Path
from kcfi.speed import FastTower
towers = [FastTower(Path(sys.argv[1]), "f32")]
def leave():
    towers.clear()
    gc.collect()
thread = threading.Thread(target=leave)
thread.start()
thread.join()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_is_handled_after_a_tower_was_freed_in_another_thread(detector, there):
    """Failed before: SIGSEGV at the next signal, or end of a child process, with a handler."""
    file = there / tower_key(load(str(detector))[0]) / FILE
    command = [sys.executable, "-c", LEFT_IN_A_THREAD, str(file)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "handled\n"


def test_the_tower_is_exported_once_and_found_by_its_weights(detector, there):
    model = load(str(detector))[0]
    folder = there / tower_key(model)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    keep_tower(model, folder / FILE)
    assert written == {path: path.stat().st_mtime_ns for path in folder.iterdir()} and len(written) == 1
    assert {path.name for path in there.iterdir()} <= {folder.name, f"{folder.name}.lock"}
    next(model.model.language_model.parameters()).data += 1
    assert tower_key(model) == folder.name
    next(model.model.vision_tower.parameters()).data += 1
    assert tower_key(model) != folder.name


@pytest.mark.parametrize(("pairs", "fast"), [(1, False), (kcfi.speed.LOADED - 1, False), (kcfi.speed.LOADED, True)])
def test_auto_takes_a_tower_that_is_kept_from_so_many_pairs_on(detector, there, pairs, fast):
    describer = build_describer(str(detector), "cpu")
    describer.expect(pairs)
    assert is_fast(describer) == fast


def test_auto_exports_for_very_many_pairs_alone(detector, nothing):
    describer = build_describer(str(detector), "cpu")
    describer.expect(kcfi.speed.EXPORTED - 1)
    assert not nothing and not is_fast(describer)
    describer.expect(kcfi.speed.EXPORTED)
    assert len(nothing) == 1 and not is_fast(describer)  # it wrote nothing, which stops nobody


def test_a_folder_that_cannot_be_written_stops_exact_and_not_auto(detector, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(kcfi.speed, "KEPT", tmp_path / "file" / "kcfi")
    describer = build_describer(str(detector), "cpu")
    describer.expect(10_000)
    assert not is_fast(describer)
    with pytest.raises(
        ValueError, match=r"--speed exact: the vision tower does not run in OpenVINO: .*Not a directory"
    ):
        speed_up(describer, "exact", 1)


def test_a_large_image_expects_its_tiles_and_a_list_its_pairs(detector, there, make_pair, monkeypatch):
    monkeypatch.setattr(kcfi.speed, "LOADED", 4)
    describer = build_describer(str(detector), "cpu")
    describer.describe(*make_pair(32, 32))
    assert not is_fast(describer)
    describer.describe(*make_pair(72, 72))
    assert is_fast(describer)


def test_a_tower_with_other_features_is_refused_by_exact_and_left_aside_by_auto(detector, there, monkeypatch):
    kept = tower_key(load(str(detector))[0])
    monkeypatch.setattr(kcfi.speed, "tower_key", lambda model: kept)
    model, processor = load(str(detector), "cpu")
    for weights in model.model.vision_tower.parameters():  # no longer the exported ones
        weights.data += 1
    describer = Describer(model, processor)
    speed_up(describer, "auto", 10_000)
    assert not is_fast(describer)
    with pytest.raises(ValueError, match=r"--speed exact: its features differ from torch's by .* Use --speed plain"):
        speed_up(describer, "exact", 1)


def test_a_broken_file_is_refused_by_exact_and_left_aside_by_auto(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(kcfi.speed, "KEPT", tmp_path)
    describer = Describer(*load(str(detector), "cpu"))
    folder = tmp_path / tower_key(describer.model)
    folder.mkdir()
    (folder / FILE).write_bytes(b"no graph")
    speed_up(describer, "auto", 10_000)
    assert not is_fast(describer)
    with pytest.raises(ValueError, match="--speed exact: the vision tower does not run in OpenVINO"):
        speed_up(describer, "exact", 1)


def test_openvino_tells_nobody_that_it_runs(detector, there):
    """Its package `openvino_telemetry`, which comes with it, sends an event at every import."""
    assert is_fast(build_describer(str(detector), "cpu", speed="exact"))
    assert sys.modules["openvino_telemetry"] is None
    assert sys.modules["openvino.tools.ovc.telemetry_utils"].tm.__name__ == "openvino.tools.ovc.telemetry_stub"


def test_no_number_counts_as_a_difference(detector, there):
    model = load(str(detector), "cpu")[0]
    tower = FastTower(there / tower_key(model) / FILE, "f32")
    assert difference(model, tower) is None
    for weights in model.model.vision_tower.parameters():
        weights.data.fill_(torch.nan)
    assert "differ from torch's by nan" in difference(model, tower)


def test_other_precisions_and_a_missing_extra_are_refused(detector, monkeypatch):
    with pytest.raises(
        ValueError, match=r"--speed exact: it takes a model in fp32, and this one is in torch\.bfloat16"
    ):
        build_describer(str(detector), "cpu", "bfloat16", speed="exact")
    monkeypatch.setattr(kcfi.speed, "NEEDED", ("openvino", "nowhere_to_be_found"))
    with pytest.raises(ValueError, match=r'nowhere_to_be_found not installed: `pip install "kcfi\[fast\]"`'):
        build_describer(str(detector), "cpu", speed="exact")
    describer = build_describer(str(detector), "cpu")
    describer.expect(10_000)
    assert not is_fast(describer)


def test_the_command_takes_it_for_a_pair_and_a_list_which_goes_on_with_another(
    detector, there, make_pair, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, image in zip(("before.png", "after.png"), make_pair(32, 32, square=(8, 8, 24, 24)), strict=True):
        image.save(name)
    Path("list.csv").write_text("before,after\nbefore.png,after.png\n")
    said = []
    for inputs in (["before.png", "after.png"], ["list.csv"]):
        for speed in ("plain", "exact"):
            output = f"{len(inputs)}-{speed}"
            options = ["--model", str(detector), "--device", "cpu", "--json", "--speed", speed, "--output", output]
            assert main(["caption", *inputs, *options]) == 0
            said.append(json.loads(capsys.readouterr().out))
    assert len({row["caption"] for row in said}) == 1
    assert {row["changed_fraction"] for row in said[:2]} == {said[0]["changed_fraction"]}
    again = ["list.csv", "--model", str(detector), "--device", "cpu", "--speed", "plain", "--output", "1-exact"]
    assert main(["caption", *again]) == 0
    assert "1 were there" in capsys.readouterr().out
    again[-3] = "bf16"  # other rows
    assert main(["caption", *again]) == 2
    assert "speed=None, not bf16: choose another --output" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU does not multiply bf16 in hardware")
def test_bf16_marks_nearly_the_same_pixels(detector, there, make_pair):
    plain, fast = (build_describer(str(detector), "cpu", speed=speed) for speed in ("plain", "bf16"))
    assert fast.encode.precision == "bf16"
    pair = make_pair(32, 32, square=(8, 8, 24, 24))
    one, other = (describer.describe(*pair) for describer in (plain, fast))
    assert one.mask.any() and (one.mask == other.mask).mean() > 0.95


def test_bf16_is_refused_where_the_cpu_lacks_it(detector, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match=r"--speed bf16: this CPU does not multiply bf16 in hardware"):
        build_describer(str(detector), "cpu", speed="bf16")
