"""Matrix products by oneDNN against PyTorch's own, with all gradients."""

import pytest
import torch
from torch import nn

from bevt_lib.base import onednn


@pytest.fixture(autouse=True)
def narrow_layers_too(monkeypatch):
    monkeypatch.setattr(onednn, "WIDE", 0)


@pytest.mark.parametrize("shape", [(1, 3), (5, 7), (2, 3, 4, 24), (3000, 17), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_pytorchs(shape, bias):
    torch.manual_seed(0)
    ours, plain = (cls(shape[-1], 12, bias=bias) for cls in (onednn.Linear, nn.Linear))
    plain.load_state_dict(ours.state_dict())
    outcomes = []
    for layer in (ours, plain):
        x = torch.linspace(-2, 2, torch.Size(shape).numel()).view(shape).requires_grad_()
        out = layer(x)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        outcomes.append([out.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for mine, expected in zip(*outcomes, strict=True):
        assert mine.shape == expected.shape
        assert torch.allclose(mine, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().sum()))


def test_what_needs_no_gradient_gets_none():
    layer, x = onednn.Linear(4, 3), torch.randn(5, 4)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None and torch.equal(layer.bias.grad, torch.full((3,), 5.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_pytorch(dtype):
    assert not onednn.is_usable(torch.zeros(2, 2, dtype=dtype))
    assert not onednn.is_usable(torch.zeros(2, 2, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.is_usable(torch.zeros(2, 2))
        assert onednn.Linear(4, 3)(torch.zeros(2, 4)).dtype == torch.bfloat16


def test_without_the_operator_everything_runs_as_usual(monkeypatch):
    layer, x = onednn.Linear(4, 3), torch.randn(5, 4)
    before = layer(x)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not onednn.is_usable(x) and torch.allclose(layer(x), before, atol=1e-6)
