import json
import sys

import peers
import pytest
import torch

from kcfi.models import load


@pytest.mark.parametrize(("backbone", "millions"), [("resnet18", 2.8), ("efficientnet_b4", 0.25)])
def test_a_detector_has_the_size_it_stands_for_and_gives_a_logit_per_pixel(backbone, millions):
    detector = peers.settle(peers.SiameseDetector(backbone, peers.PEERS[backbone]), torch.randn(2, 2, 3, 64, 64))
    size = sum(weight.numel() for weight in detector.parameters()) / 1e6
    assert millions < size < 1.4 * millions
    before, after = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        forth, back = (detector(torch.stack(pair, dim=1)) for pair in ((before, after), (after, before)))
        same = detector(torch.stack((before, before), dim=1))
    assert forth.shape == (2, 2, 64, 64)
    torch.testing.assert_close(forth, back)  # differences have no sign
    torch.testing.assert_close(same[0], same[1])
    assert (forth - same).abs().max() > 0.01


def test_both_sides_see_the_same_pairs(detector, monkeypatch, capsys):
    monkeypatch.setattr(peers, "load", lambda *_: load(str(detector)))
    monkeypatch.setattr(peers, "matmul_peak", lambda: 1e12)
    monkeypatch.setattr(peers, "PEERS", {"efficientnet_b4": (0, 1, 2)})
    monkeypatch.setattr(peers, "PASSES", 1)
    monkeypatch.setattr(sys, "argv", ["peers.py", "--json", "--repeats", "1"])
    peers.main()
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["case"].startswith("a mask: efficientnet_b4 with 0.") and row["bar"] is None
    assert min(row["gflop"]) > 0 and row["plain"] > 0 and row["ours"] > 0
