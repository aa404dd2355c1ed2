"""The perceiver against references written without grid_sample, and eq. 3's dead point."""

import math

import pytest
import torch

from kcfi.modeling_kcfi import KCFIModel
from kcfi.modeling_kcfi.key_change_perceiver import KeyChangePerceiver, warp


def bilinear_by_loops(features, flow):
    """W(F, flow) of eq. 2 for one map (C, h, w) and one field (2, h, w), position by position."""
    _, height, width = features.shape
    rows = []
    for i in range(height):
        row = []
        for j in range(width):
            x = (j + flow[0, i, j]).clamp(0, width - 1)
            y = (i + flow[1, i, j]).clamp(0, height - 1)
            left, top = min(int(x), max(width - 2, 0)), min(int(y), max(height - 2, 0))
            right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
            upper = features[:, top, left] * (1 - (x - left)) + features[:, top, right] * (x - left)
            lower = features[:, bottom, left] * (1 - (x - left)) + features[:, bottom, right] * (x - left)
            row.append(upper * (1 - (y - top)) + lower * (y - top))
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def flow_net_by_hand(net, pair):
    """The layers of a flow net, with instance norm and GELU spelled out."""
    hidden = pair
    for layer in net:
        if isinstance(layer, torch.nn.InstanceNorm2d):
            variance, mean = torch.var_mean(hidden, dim=(2, 3), correction=0, keepdim=True)
            hidden = (hidden - mean) / (variance + 1e-5).sqrt()
        elif isinstance(layer, torch.nn.GELU):
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        else:
            hidden = layer(hidden)
    return hidden


def residuals_by_loops(before, after, flows, cross):
    """Eq. 3 for a batch: the two residuals, each (B, C, h, w)."""
    pairs = list(zip(before, after, flows, strict=True))
    first = torch.stack([bilinear_by_loops(b, f[:2]) - (a if cross else b) for b, a, f in pairs])
    second = torch.stack([bilinear_by_loops(a, f[2:]) - (b if cross else a) for b, a, f in pairs])
    return first, second


def perceiver_by_hand(perceiver, before, after):
    """Key change features (B, N, L*C), stage by stage."""
    cross = perceiver.flow_residual == "cross"
    stages = []
    for net, b, a in zip(perceiver.flow_nets, before, after, strict=True):
        first, second = residuals_by_loops(b, a, flow_net_by_hand(net, torch.cat([b, a], dim=1)), cross)
        if perceiver.global_flow_net is not None:
            flows = flow_net_by_hand(perceiver.global_flow_net, torch.cat([*before, *after], dim=1))
            global_first, global_second = residuals_by_loops(b, a, flows, cross)
            first, second = first + global_first, second + global_second
        stages.append((first - second).abs())
    channels_last = [stage.permute(0, 2, 3, 1).reshape(stage.shape[0], -1, stage.shape[1]) for stage in stages]
    return torch.cat(channels_last, dim=-1)


@pytest.fixture
def make_perceiver(make_config):
    def make(zero_flow=False, std=0.3, **settings):
        torch.manual_seed(0)
        perceiver = KeyChangePerceiver(make_config(**settings))
        for parameter in perceiver.parameters():
            torch.nn.init.normal_(parameter, std=std)
        nets = [*perceiver.flow_nets, *([perceiver.global_flow_net] if perceiver.global_flow_net else [])]
        for net in nets if zero_flow else []:
            torch.nn.init.zeros_(net[-1].weight)
            torch.nn.init.zeros_(net[-1].bias)
        return perceiver

    return make


def stages(batch=2, grid=(5, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(batch, 32, *grid, generator=generator) for _ in range(2)] for _ in range(2)]


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (2, 7), (1, 4), (1, 1)])
def test_warp_and_its_gradients_equal_a_sampler_of_plain_loops(both_algorithms, grid):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, *grid, generator=generator)
    flow = torch.randn(2, 2, *grid, generator=generator) * 1.5  # some positions fall outside the map
    weight = torch.randn(2, 3, *grid, generator=generator)
    ours = [features.clone().requires_grad_(), flow.clone().requires_grad_()]
    reference = [features.double().requires_grad_(), flow.double().requires_grad_()]

    warped = warp(*ours)
    expected = torch.stack([bilinear_by_loops(*one) for one in zip(*reference, strict=True)])
    torch.testing.assert_close(warped.double(), expected, atol=1e-5, rtol=1e-5)

    (warped * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, our, other in zip(("features", "flow"), ours, reference, strict=True):
        torch.testing.assert_close(our.grad.double(), other.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_the_reference_sampler_has_the_gradients_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    flow = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64) * 0.8 + 0.1  # away from the kinks
    assert torch.autograd.gradcheck(bilinear_by_loops, (features, flow.requires_grad_()))


def test_flow_is_in_patches_to_the_right_and_down():
    features = torch.arange(12.0).view(1, 1, 3, 4)
    right = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 3, 4)
    down = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 3, 4)
    torch.testing.assert_close(warp(features, right)[0, 0, 0], torch.tensor([1.0, 2.0, 3.0, 3.0]))
    torch.testing.assert_close(warp(features, down)[0, 0, :, 0], torch.tensor([4.0, 8.0, 8.0]))


def test_bf16_features_are_warped_in_fp32(both_algorithms):
    features, flow = torch.randn(1, 3, 33, 33, dtype=torch.bfloat16), torch.full((1, 2, 33, 33), 0.25)
    warped = warp(features, flow.bfloat16())
    assert warped.dtype == torch.bfloat16
    # bf16 positions would be off by up to 1/8 patch at column 32
    torch.testing.assert_close(warped, warp(features.float(), flow).bfloat16())


@pytest.mark.parametrize("flow_scope", ["stage", "stage_and_global"])
@pytest.mark.parametrize("flow_residual", ["self", "cross"])
def test_perceiver_and_its_gradients_equal_the_equations(make_perceiver, flow_residual, flow_scope):
    perceiver = make_perceiver(flow_residual=flow_residual, flow_scope=flow_scope)
    before, after = stages()
    change = perceiver(before, after)
    assert change.shape == (2, 15, 64)
    weight = torch.randn(change.shape, generator=torch.Generator().manual_seed(3))
    (change * weight).sum().backward()

    reference = make_perceiver(flow_residual=flow_residual, flow_scope=flow_scope).double()
    expected = perceiver_by_hand(reference, [b.double() for b in before], [a.double() for a in after])
    torch.testing.assert_close(change.double(), expected, atol=1e-4, rtol=1e-4)
    (expected * weight).sum().backward()
    for (name, ours), other in zip(perceiver.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), other.grad, atol=2e-3, rtol=2e-3, msg=name)


@pytest.mark.parametrize("flow_scope", ["stage", "stage_and_global"])
@pytest.mark.parametrize("side", [9, 17])
def test_self_residual_is_dead_at_zero_flow(make_perceiver, side, flow_scope):
    perceiver = make_perceiver(zero_flow=True, flow_residual="self", flow_scope=flow_scope)
    before, after = stages(grid=(side, side))
    before, after = [b.requires_grad_() for b in before], [a.requires_grad_() for a in after]
    change = perceiver(before, after)
    change.sum().backward()
    assert change.abs().max() == 0
    for tensor in [*before, *after, *perceiver.parameters()]:
        assert tensor.grad.abs().max() == 0


@pytest.mark.parametrize("side", [9, 16, 17])
def test_cross_residual_is_twice_the_difference_at_zero_flow_and_alive(make_perceiver, side):
    perceiver = make_perceiver(zero_flow=True, flow_residual="cross")
    before, after = stages(grid=(side, side))
    change = perceiver(before, after)
    twice = torch.cat([2 * (a - b).abs() for b, a in zip(before, after, strict=True)], dim=1)
    torch.testing.assert_close(change, twice.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
    change.sum().backward()
    assert all(net[-1].weight.grad.abs().max() > 0 for net in perceiver.flow_nets)


def test_self_residual_is_alive_at_the_initial_weights(make_config):
    torch.manual_seed(0)
    perceiver = KCFIModel(make_config(flow_residual="self")).key_change_perceiver
    change = perceiver(*stages(grid=(9, 9)))
    change.sum().backward()
    assert change.abs().mean() > 1e-3
    assert all(net[-1].weight.grad.abs().max() > 0 for net in perceiver.flow_nets)


def test_perceiver_in_bf16_is_close_to_fp32(make_perceiver):
    before, after = stages(grid=(6, 4))
    exact = make_perceiver(flow_residual="cross", std=0.1)(before, after)
    rounded = make_perceiver(flow_residual="cross", std=0.1).bfloat16()(
        [b.bfloat16() for b in before], [a.bfloat16() for a in after]
    )
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.02 * exact.mean()
