"""The change detection head: change features -> mask logits (eq. 5 to 7), and its loss (eq. 9)."""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_kcfi import KCFIConfig

NO_LABEL = 255  # class id of pixels without a label: they are left out of the loss and of the scores


class ChangeDetectionHead(nn.Module):
    """Change features (B, N, C_in) of an h x w grid of patches -> mask logits (B, classes, H, W).

    Linear map (eq. 5), reshape, 1x1 convolution (eq. 7), bilinear upsampling (eq. 6). The paper upsamples before it
    convolves; the two commute, because bilinear weights sum to 1, and this order never holds a map of
    `head_hidden_size` channels at full resolution.
    """

    def __init__(self, config: KCFIConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.change_width, config.head_hidden_size)
        self.classifier = nn.Conv2d(config.head_hidden_size, config.num_change_classes, kernel_size=1)

    def forward(self, change: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        """See the class; `grid` is (h, w) with h * w = N, `size` is (H, W) in pixels."""
        hidden = self.linear(change).transpose(1, 2).unflatten(2, grid)  # (B,hidden,h,w)
        return F.interpolate(self.classifier(hidden), size=size, mode="bilinear", align_corners=False)


def mask_loss(mask_logits: torch.Tensor, mask_labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy per labelled pixel: eq. 9, which for two classes is the sigmoid of the two logits' difference.

    Args:
        mask_logits: (B, classes, H, W).
        mask_labels: (B, H, W) class ids, 255 = no label.

    Returns:
        Mean over the labelled pixels of the batch, fp32; 0 (with a zero gradient) when there is none.
    """
    if torch.are_deterministic_algorithms_enabled():  # on CUDA there is none for maps, but one for rows of logits
        mask_logits, mask_labels = mask_logits.movedim(1, -1).flatten(0, -2), mask_labels.flatten()
    summed = F.cross_entropy(mask_logits.float(), mask_labels, ignore_index=NO_LABEL, reduction="sum")
    return summed / (mask_labels != NO_LABEL).sum().clamp(min=1)
