"""The head in the paper's own order of operations, and its loss by hand."""

import math

import pytest
import torch

from kcfi.modeling_kcfi.change_detection_head import ChangeDetectionHead, mask_loss


def upsample_by_loops(maps, size):
    """Bilinear upsampling (B, C, h, w) -> (B, C, H, W) between pixel centres (align_corners off)."""
    height, width = maps.shape[-2:]
    out = torch.zeros(*maps.shape[:2], *size, dtype=maps.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5) * height / size[0] - 0.5, 0), height - 1)
            x = min(max((j + 0.5) * width / size[1] - 0.5, 0), width - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = maps[..., top, left] * (1 - (x - left)) + maps[..., top, right] * (x - left)
            lower = maps[..., bottom, left] * (1 - (x - left)) + maps[..., bottom, right] * (x - left)
            out[..., i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return out


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("grid", "size"), [((4, 4), (16, 16)), ((3, 5), (12, 20)), ((2, 3), (7, 11))])
def test_head_equals_linear_reshape_upsample_conv(make_config, classes, grid, size):
    torch.manual_seed(0)
    head = ChangeDetectionHead(make_config(num_change_classes=classes))
    change = torch.randn(2, grid[0] * grid[1], 64)

    hidden = change @ head.linear.weight.T + head.linear.bias  # eq. 5
    maps = hidden.transpose(1, 2).reshape(2, 8, *grid)
    upsampled = upsample_by_loops(maps, size)  # eq. 6
    weight, bias = head.classifier.weight[:, :, 0, 0], head.classifier.bias
    expected = torch.einsum("kc,bchw->bkhw", weight, upsampled) + bias[None, :, None, None]  # eq. 7
    torch.testing.assert_close(head(change, grid, size), expected, atol=1e-5, rtol=1e-5)


def test_two_class_loss_and_its_gradient_are_eq_9(both_algorithms):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (2, 3, 4), generator=generator)

    probability = 1 / (1 + torch.exp(logits[:, 0] - logits[:, 1]))  # Y: sigmoid of the two logits' difference
    expected = -(labels * probability.log() + (1 - labels) * (1 - probability).log()).mean()
    gradient = torch.autograd.grad(expected, logits)[0]

    loss = mask_loss(logits, labels)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], gradient, atol=1e-6, rtol=1e-6)


def test_three_class_loss_is_the_mean_over_labelled_pixels(both_algorithms):
    logits = torch.tensor([[[[2.0, 0.0]], [[1.0, 0.0]], [[0.0, 3.0]]]])  # (1,3,1,2)
    first = -math.log(math.exp(1) / (math.exp(2) + math.exp(1) + math.exp(0)))
    second = -math.log(math.exp(3) / (1 + 1 + math.exp(3)))
    assert mask_loss(logits, torch.tensor([[[1, 2]]])).item() == pytest.approx((first + second) / 2)
    assert mask_loss(logits, torch.tensor([[[1, 255]]])).item() == pytest.approx(first)


def test_pairs_without_a_mask_add_nothing(both_algorithms):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 4))
    labels[1] = 255
    loss = mask_loss(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(mask_loss(logits[:1], labels[:1]).item())
    assert logits.grad[0].abs().max() > 0
    assert logits.grad[1].abs().max() == 0


def test_a_batch_without_any_mask_has_loss_and_gradient_zero(both_algorithms):
    logits = torch.randn(2, 2, 4, 4, requires_grad=True)
    loss = mask_loss(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_loss_of_bf16_logits_is_summed_in_fp32():
    logits = torch.randn(1, 2, 64, 64).bfloat16()
    labels = torch.randint(0, 2, (1, 64, 64))
    assert mask_loss(logits, labels).dtype == torch.float32
    torch.testing.assert_close(mask_loss(logits, labels), mask_loss(logits.float(), labels))
