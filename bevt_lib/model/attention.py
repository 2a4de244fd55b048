"""Attention inside windows, twice: as one writes it down, and without storing the logits.

Both take ``qkv`` (B, windows, N, 3, heads, c): the queries, keys and values of the N tokens of each
window, and ``bias`` (heads, N, N), added to the logits of every window; both return
(B, windows, N, heads, c). :func:`attend` chooses; a test holds them equal, gradients too.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Kinds = tuple[tuple[Tensor, Tensor], ...]  # windows with the same mask: int64 (n,), float (N, N)
FUSED_FROM = 128  # tokens of a window from which a CPU trains faster by the kernel, measured
CHUNK = 2**19  # logits that a backward pass on a CPU holds at a time: they stay in its cache


def attend(qkv: Tensor, bias: Tensor, mask: Tensor | None, kinds: Kinds) -> Tensor:
    """Attend by the fused kernel, but for small windows in training on a CPU."""
    if qkv.device.type == "cpu" and torch.is_grad_enabled() and qkv.shape[2] < FUSED_FROM:
        return plain_attention(qkv, bias, mask)
    return fused_attention(qkv, bias, kinds)


def plain_attention(qkv: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of queries times keys, plus bias and mask (windows, N, N), times values."""
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each (B, windows, heads, N, c)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    if mask is not None:
        logits = logits + mask[:, None]
    return (logits.softmax(dim=-1) @ v).transpose(2, 3)


def fused_attention(qkv: Tensor, bias: Tensor, kinds: Kinds) -> Tensor:
    """Give :func:`plain_attention` by PyTorch's fused kernel, one call for each kind of window.

    ``kinds`` are the windows that share a mask; none: no window has one. The kernel reads bias and
    mask as one constant and holds a few rows of logits at a time, so that memory grows with N and
    not with its square. Source: FlashAttention (Dao et al. 2022), as PyTorch has it.
    """
    kernel = _kernel if qkv.is_cuda else _FusedOnCpu.apply
    bias = bias.to(qkv.dtype)
    if not kinds:
        return kernel(qkv.flatten(0, 1), bias).unflatten(0, qkv.shape[:2])
    parts = []
    for windows, mask in kinds:
        mine = qkv[:, windows]
        out = kernel(mine.flatten(0, 1), bias + mask.to(bias.dtype))
        parts.append(out.unflatten(0, mine.shape[:2]))
    order = torch.cat([windows for windows, _ in kinds]).argsort()
    return torch.cat(parts, dim=1)[:, order]


def _kernel(qkv: Tensor, bias: Tensor) -> Tensor:
    """Attend within (windows, N, 3, heads, c) by PyTorch's fused kernel."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]).transpose(1, 2)


class _FusedOnCpu(torch.autograd.Function):
    """The kernel with a gradient for the bias, which PyTorch's has on CUDA only.

    A few windows at a time, their logits are computed once more.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor) -> Tensor:
        out = _kernel(qkv, bias.detach()).contiguous()  # which it is, but on meta
        ctx.save_for_backward(qkv, bias, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        qkv, bias, out = ctx.saved_tensors
        grad_qkv, grad_bias = torch.empty_like(qkv), torch.zeros_like(bias)
        scale = qkv.shape[-1] ** -0.5
        chunk = max(1, CHUNK // bias.numel())
        parts = (t.split(chunk) for t in (qkv, out, grad, grad_qkv))
        for mine, o, g, grad_mine in zip(*parts, strict=True):
            q, k, v = mine.permute(2, 0, 3, 1, 4)  # each (windows, heads, N, c)
            dq, dk, dv = grad_mine.permute(2, 0, 3, 1, 4)
            g = g.transpose(1, 2)
            q = q * scale
            p = (q @ k.transpose(-2, -1)).add_(bias).softmax(dim=-1)
            # The softmax's gradient: its row sums are those of the output times its gradient.
            rows = (g * o.transpose(1, 2)).sum(dim=-1, keepdim=True)
            d_logits = (g @ v.transpose(-2, -1)).sub_(rows).mul_(p)
            torch.mul(d_logits @ k, scale, out=dq)
            dk.copy_(d_logits.transpose(-2, -1) @ q)
            dv.copy_(p.transpose(-2, -1) @ g)
            grad_bias += d_logits.sum(dim=0)
        return grad_qkv, grad_bias
