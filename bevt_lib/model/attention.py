"""Attention inside windows, twice: as one writes it down, and by PyTorch's fused kernel.

Both take ``qkv`` (B, windows, N, 3, heads, c): the queries, keys and values of the N tokens of each
window, and ``bias`` (heads, N, N), added to the logits of every window; both return
(B, windows, N, heads, c). :func:`attend` chooses; a test holds them equal, gradients too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Kinds = tuple[tuple[Tensor, Tensor], ...]  # windows with the same mask: int64 (n,), float (N, N)


def attend(qkv: Tensor, bias: Tensor, mask: Tensor | None, kinds: Kinds) -> Tensor:
    """Attend by the fused kernel on a GPU, and on a CPU where nothing is trained.

    ``qkv``, ``bias`` and what is returned: see above; ``mask`` is float (windows, N, N) or None,
    ``kinds`` says the same by window. A CPU's kernel has no gradient for the bias; to compute that
    apart, from logits computed once more, takes about as long as the plain form.
    """
    if qkv.is_cuda or (qkv.device.type == "cpu" and not torch.is_grad_enabled()):
        return fused_attention(qkv, bias, kinds)
    return plain_attention(qkv, bias, mask)


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
    mask as one matrix and holds a few rows of logits at a time, so that memory grows with N and
    not with its square. Source: FlashAttention (Dao et al. 2022), as PyTorch has it.
    """

    def call(qkv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = qkv.flatten(0, 1).permute(2, 0, 3, 1, 4)  # each (B * windows, heads, N, c)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return out.transpose(1, 2).unflatten(0, qkv.shape[:2])

    bias = bias.to(qkv.dtype)
    if not kinds:
        return call(qkv, bias)
    parts = [call(qkv[:, windows], bias + mask.to(bias.dtype)) for windows, mask in kinds]
    order = torch.cat([windows for windows, _ in kinds]).argsort()
    return torch.cat(parts, dim=1)[:, order]
