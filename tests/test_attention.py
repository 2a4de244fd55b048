"""The fused attention against the plain one, with all gradients, for every kind of window."""

from itertools import product

import pytest
import torch

from bevt_lib.model.attention import fused_attention, plain_attention
from bevt_lib.model.swin import WindowAttention, window_plan

CPU = torch.device("cpu")
# Maps and full windows: whole ones, padded ones, windows larger than the map, an image.
WINDOWS = {
    "whole": ((4, 6, 6), (2, 3, 3)), "padded": ((3, 7, 5), (2, 3, 3)),
    "one in time": ((2, 6, 9), (4, 3, 3)), "larger": ((2, 2, 2), (4, 3, 3)),
    "image": ((1, 6, 9), (4, 3, 3)), "as released": ((8, 14, 14), (8, 7, 7)),
}  # fmt: skip


def outcome(attend, qkv, bias, extra):
    """Give the output and the gradients of everything that learns."""
    qkv, bias = (t.detach().requires_grad_() for t in (qkv, bias))
    out = attend(qkv, bias, extra)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weight).sum().backward()
    return out.detach(), qkv.grad, bias.grad


@pytest.mark.parametrize("shifted, quirks", product((False, True), repeat=2))
@pytest.mark.parametrize("name", WINDOWS)
def test_fused_attention_is_the_plain_one(name, shifted, quirks):
    size, window = WINDOWS[name]
    plan = window_plan(size, window, shifted, quirks, CPU)
    windows = 1 if plan.mask is None else len(plan.mask)
    tokens, heads = len(plan.bias_index), 2
    if plan.mask is not None:  # the kinds hold each window once, and the mask they say
        rebuilt = torch.empty_like(plan.mask)
        for mine, mask in plan.kinds:
            rebuilt[mine] = mask
        assert torch.equal(rebuilt, plan.mask)
        assert sum(len(mine) for mine, _ in plan.kinds) == windows
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        qkv = torch.randn(3, windows, tokens, 3, heads, 5, generator=generator, dtype=dtype)
        bias = torch.randn(heads, tokens, tokens, generator=generator, dtype=dtype)
        ours = outcome(fused_attention, qkv, bias, plan.kinds)
        plain = outcome(plain_attention, qkv, bias, plan.mask)
        for mine, expected in zip(ours, plain, strict=True):
            assert torch.allclose(mine, expected, atol=tolerance * float(expected.abs().max()))


def test_a_block_gives_the_same_with_and_without_gradients():
    plan = window_plan((2, 6, 6), (2, 3, 3), True, False, CPU)
    torch.manual_seed(0)
    block = WindowAttention(8, 2, (2, 3, 3)).double()
    torch.nn.init.normal_(block.bias_table)
    x = torch.randn(2 * len(plan.mask), 18, 8, dtype=torch.float64)
    with torch.no_grad():
        fused = block(x, plan)
    assert torch.allclose(fused, block(x, plan), rtol=1e-10, atol=1e-12)


def test_a_mean_of_the_values_by_hand():
    """Equal logits average the values; a mask of -100 leaves the masked ones out."""
    qkv = torch.zeros(1, 1, 4, 3, 1, 2)
    qkv[..., 2, :, :] = torch.arange(4.0)[None, None, :, None, None]
    bias = torch.zeros(1, 4, 4)
    mask = torch.zeros(1, 4, 4)
    mask[..., 2:] = -100.0
    for mine, expected in ((None, 1.5), (mask, 0.5)):
        kinds = () if mine is None else ((torch.tensor([0]), mine[0]),)
        for out in (plain_attention(qkv, bias, mine), fused_attention(qkv, bias, kinds)):
            assert out.shape == (1, 1, 4, 1, 2)
            assert torch.allclose(out, torch.tensor(expected))
