"""Matrix products by oneDNN, which PyTorch brings along and uses for convolutions only.

For float32 on x86 PyTorch calls MKL, which is the slower one on AMD's processors. oneDNN's operator
isn't public, only torch.compile uses it: where it is missing, and everywhere else, PyTorch's own is
called. Our choice.
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

X86 = platform.machine() in ("x86_64", "AMD64")
WIDE = 256  # features in and out from which a layer is faster: measured
FEW = 2048  # rows up to which the weight's gradient is faster, too: measured


def is_usable(x: Tensor) -> bool:
    """Say whether oneDNN can multiply ``x``: float32 on an x86 CPU, outside of autocast."""
    plain = X86 and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
    plain = plain and torch.backends.mkldnn.is_available() and not torch.compiler.is_compiling()
    there = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return plain and there and not torch.is_autocast_enabled("cpu")


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do F.linear(x, weight, bias), without a gradient; the weight may be packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Linear(nn.Linear):
    """PyTorch's linear layer, by oneDNN where that can be used and pays."""

    def forward(self, x: Tensor) -> Tensor:
        if min(self.weight.shape) < WIDE or not is_usable(x):
            return F.linear(x, self.weight, self.bias)
        return _Product.apply(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """F.linear with its gradients, all by oneDNN but those that MKL has sooner."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        rows, given = grad.flatten(0, -2), x.flatten(0, -2)
        of_weight = None
        if to_weight:
            of_weight = multiply(rows.T, given.T) if len(rows) <= FEW else rows.T @ given
        of_x = multiply(rows, weight.T).view(x.shape) if to_x else None
        return of_x, of_weight, rows.sum(dim=0) if to_bias else None
