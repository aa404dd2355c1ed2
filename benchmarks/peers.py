"""The mask of kcfi-tiny against convolutional change detectors of the sizes of BIT and TinyCD, at the same input.

```
python benchmarks/peers.py
```

The detectors are not those of the papers (arXiv 2103.00208 and 2207.13159), whose packages are heavy: they have their
backbones, ResNet-18 up to stride 16 and EfficientNet-b4 up to stride 8, as timm builds them, and a plain decoder over
the differences of both dates in place of what the papers add. So they tell what a mask of that size costs, not how
good it is: all weights are random but kcfi-tiny's. One pair of 256 x 256 px at a time, fp32; kcfi-tiny computes what
its sentences need along, and writes none.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
from flops import matmul_peak
from measure import comparison, loaded_memory, options_of, report, take_turns, warm_up
from torch import nn
from torch.nn import functional as F

from kcfi.models import load

PASSES = 5  # of a round
PEERS = {"resnet18": (1, 2, 3), "efficientnet_b4": (0, 1, 2)}  # backbone of timm, and its stages


class SiameseDetector(nn.Module):
    """Pairs (B, 2, 3, H, W) -> mask logits (B, 2, H, W): one backbone for both dates, differences of its stages.

    Args:
        backbone: name in timm.
        stages: its stages that are read, the finest first; those behind the last one are cut off.
        width: channels of the decoder.
    """

    def __init__(self, backbone: str, stages: tuple[int, ...], width: int = 64) -> None:
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True, out_indices=stages, feature_cls="getter")
        self.decoder = nn.Sequential(
            nn.Conv2d(sum(self.backbone.feature_info.channels()), width, kernel_size=1),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2, kernel_size=1),
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See the class."""
        maps = self.backbone(pixel_values.flatten(0, 1))
        size = maps[0].shape[-2:]
        differences = [F.interpolate((stage[0::2] - stage[1::2]).abs(), size, mode="bilinear") for stage in maps]
        return F.interpolate(self.decoder(torch.cat(differences, dim=1)), pixel_values.shape[-2:], mode="bilinear")


def settle(detector: nn.Module, pixel_values: torch.Tensor) -> nn.Module:
    """Give the batch norms the statistics of these pairs: random weights would shrink what they see to numbers near 0.

    Returns:
        The detector in evaluation mode.
    """
    for norm in detector.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        detector.train()(pixel_values)
    return detector.eval()


def repeated(run: Callable[[], Any]) -> Callable[[], None]:
    """A side of `PASSES` passes without gradients."""

    def side() -> None:
        with torch.no_grad():
            for _ in range(PASSES):
                run()

    return side


def main() -> None:
    """Print pairs per second and memory of kcfi-tiny and of every detector."""
    options = options_of(__doc__).parse_args()
    model, _ = load("kcfi-tiny", "cpu", "float32")
    side = model.config.image_size
    torch.manual_seed(0)
    pixels, rows = torch.randn(1, 2, 3, side, side), []
    for backbone, stages in PEERS.items():
        peer = settle(SiameseDetector(backbone, stages), pixels)
        assert peer(pixels).shape[-2:] == model.get_image_features(pixel_values=pixels).mask_logits.shape[-2:]
        sides = {
            "plain": repeated(lambda peer=peer: peer(pixels)),
            "ours": repeated(lambda: model.get_image_features(pixel_values=pixels)),
        }
        _, operations = warm_up(sides)
        rounds = take_turns(sides, options.repeats, loaded_memory())
        size = sum(weight.numel() for weight in peer.parameters()) / 1e6
        title = f"a mask: {backbone} with {size:.2f} M weights, against kcfi-tiny"
        rows.append(comparison(title, rounds, PASSES, "pairs/s", None, "-", operations, matmul_peak()))
    report("peers", rows, options.json)


if __name__ == "__main__":
    main()
