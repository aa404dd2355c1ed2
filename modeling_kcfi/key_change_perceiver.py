"""The key change perceiver: stage features of both dates -> key change features (Fig. 3, eq. 2 and 3).

Letters: B pairs, L stages, C channels of a stage, h x w grid of patches, N = h * w.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_kcfi import KCFIConfig


def warp(features: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Sample features at positions moved by a flow field, bilinearly: W(F, flow) of eq. 2.

    Args:
        features: (B, C, h, w).
        flow: (B, 2, h, w), in patches: flow[:, 0] moves the sampling position to the right, flow[:, 1] down.
            Positions outside the map read its border.

    Returns:
        (B, C, h, w) in the dtype of `features`; computed in fp32, because bf16 cannot tell positions apart.
    """
    if torch.are_deterministic_algorithms_enabled():  # of grid_sample, CUDA has no such gradient
        return _warp_by_gathering(features.float(), flow.float()).to(features.dtype)
    height, width = features.shape[-2:]
    ys = torch.arange(height, device=flow.device, dtype=torch.float32)
    xs = torch.arange(width, device=flow.device, dtype=torch.float32)
    x = (xs + flow[:, 0].float()) * (2 / max(width - 1, 1)) - 1  # (B,h,w), -1..1 from first to last patch centre
    y = (ys[:, None] + flow[:, 1].float()) * (2 / max(height - 1, 1)) - 1
    grid = torch.stack([x, y], dim=-1)
    warped = F.grid_sample(features.float(), grid, mode="bilinear", padding_mode="border", align_corners=True)
    return warped.to(features.dtype)


def _warp_by_gathering(features: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """`warp` in fp32 by the four neighbours of each position: slower, and its gradient has one order of summation."""
    batch, channels, height, width = features.shape
    x = (torch.arange(width, device=flow.device) + flow[:, 0]).clamp(0, width - 1)  # (B,h,w)
    y = (torch.arange(height, device=flow.device)[:, None] + flow[:, 1]).clamp(0, height - 1)
    left, top = x.detach().floor().long(), y.detach().floor().long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    to_right, down = (x - left)[:, None], (y - top)[:, None]

    def at(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        places = (row * width + column).view(batch, 1, -1).expand(-1, channels, -1)
        return features.flatten(2).gather(2, places).view_as(features)

    upper = at(top, left) * (1 - to_right) + at(top, right) * to_right
    lower = at(bottom, left) * (1 - to_right) + at(bottom, right) * to_right
    return upper * (1 - down) + lower * down


def flatten_stages(stages: list[torch.Tensor]) -> torch.Tensor:
    """L maps (B, C, h, w) -> features (B, N, L*C)."""
    return torch.cat(stages, dim=1).flatten(2).transpose(1, 2)


def stage_flow_net(channels: int) -> nn.Sequential:
    """Both dates of one stage, (B, 2C, h, w) -> their two flow fields, (B, 2 * 2, h, w).

    Depth-wise 3x3, norm, GELU, 1x1 to C, depth-wise 3x3 to 2C, norm, GELU, 1x1 to 4: the layers of the authors' code,
    since the text says no more than "flow estimation network".
    """
    return nn.Sequential(
        nn.Conv2d(2 * channels, 2 * channels, kernel_size=3, padding=1, groups=2 * channels),
        nn.InstanceNorm2d(2 * channels),
        nn.GELU(),
        nn.Conv2d(2 * channels, channels, kernel_size=1),
        nn.Conv2d(channels, 2 * channels, kernel_size=3, padding=1, groups=channels),
        nn.InstanceNorm2d(2 * channels),
        nn.GELU(),
        nn.Conv2d(2 * channels, 4, kernel_size=1),
    )


def global_flow_net(channels: int) -> nn.Sequential:
    """All stages of both dates, (B, 2LC, h, w) -> two flow fields, (B, 2 * 2, h, w): one depth-wise 5x5, then 1x1."""
    return nn.Sequential(
        nn.Conv2d(2 * channels, 2 * channels, kernel_size=5, padding=2, groups=2 * channels),
        nn.InstanceNorm2d(2 * channels),
        nn.GELU(),
        nn.Conv2d(2 * channels, 4, kernel_size=1),
    )


class KeyChangePerceiver(nn.Module):
    """Stage features before and after -> key change features, read by the projector and the change detection head.

    Two lists of L maps (B, C, h, w) -> (B, N, L*C). Per stage: concatenate, estimate two flow fields, warp each date
    by its own (eq. 2), subtract (eq. 3: its own date, or the other one with `flow_residual="cross"`), and take the
    absolute difference of the two residuals. With `flow_scope="stage_and_global"` a second pair of fields, estimated
    from all stages, gives further residuals that are added to the first.

    At zero flow "self" residuals are 0 and so is their gradient (the sign of 0 is 0): the flow nets must never be
    initialised to zero output.
    """

    def __init__(self, config: KCFIConfig) -> None:
        super().__init__()
        self.flow_residual = config.flow_residual
        channels, stages = config.stage_channels, config.num_stages
        self.flow_nets = nn.ModuleList([stage_flow_net(channels) for _ in range(stages)])
        self.global_flow_net = global_flow_net(stages * channels) if config.flow_scope == "stage_and_global" else None

    def residuals(
        self, before: torch.Tensor, after: torch.Tensor, flows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The two residuals of eq. 3, each (B, C, h, w), under the flow fields (B, 2 * 2, h, w) of both dates."""
        warped_before, warped_after = warp(before, flows[:, :2]), warp(after, flows[:, 2:])
        if self.flow_residual == "self":
            return warped_before - before, warped_after - after
        return warped_before - after, warped_after - before

    def forward(self, before: list[torch.Tensor], after: list[torch.Tensor]) -> torch.Tensor:
        """See the class."""
        global_flows = None
        if self.global_flow_net is not None:
            global_flows = self.global_flow_net(torch.cat([*before, *after], dim=1))
        changes = []
        for flow_net, stage_before, stage_after in zip(self.flow_nets, before, after, strict=True):
            flows = flow_net(torch.cat([stage_before, stage_after], dim=1))
            residual_before, residual_after = self.residuals(stage_before, stage_after, flows)
            if global_flows is not None:
                global_before, global_after = self.residuals(stage_before, stage_after, global_flows)
                residual_before, residual_after = residual_before + global_before, residual_after + global_after
            changes.append((residual_before - residual_after).abs())
        return flatten_stages(changes)
