"""Fast convolutions against F.conv2d, and the ids of a wide encoder against the package's own."""

import dall_e
import pytest
import torch
from torch.nn.functional import conv2d

from bevt_lib.tokenizers import base, dalle, winograd

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
SIZES = [(1, 1, 1), (1, 3, 5), (2, 4, 4), (3, 6, 9), (1, 8, 13), (2, 14, 14), (17, 7, 30)]


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [(1, 2), (5, 3), (64, 128)])
def test_convolutions_are_torchs(size, channels, layout):
    """Of all sizes, also those that are no multiple of a tile; the truth is float64."""
    (n, h, w), (c, k) = size, channels
    x = numbers(n, c, h, w).contiguous(memory_format=layout)
    bias = numbers(k)
    for fast, side in ((winograd.conv3x3, 3), (winograd.conv1x1, 1)):
        weight = numbers(k, c, side, side) / (c * side**2) ** 0.5
        truth = conv2d(x.double(), weight.double(), bias.double(), padding=side // 2)
        found = fast(x, weight, bias)
        assert found.dtype == torch.float32 and found.shape == truth.shape
        assert (found - truth).abs().max() < (1e-4 if side == 3 else 1e-5)


def test_a_changed_weight_is_packed_anew():
    x, weight, bias = numbers(1, 8, 8, 8), torch.nn.Parameter(numbers(8, 8, 3, 3)), numbers(8)
    with torch.no_grad():
        for change in (lambda: None, lambda: weight.mul_(2), lambda: weight.copy_(weight.flip(0))):
            change()
            assert torch.allclose(
                winograd.conv3x3(x, weight, bias), conv2d(x, weight, bias, padding=1), atol=1e-3
            )


def test_a_wide_encoder_gives_the_packages_ids_also_after_loading_others(monkeypatch):
    """Random weights, residual paths at full size so that they matter; more than one chunk."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(base, "CPU_PIXELS", 4 * 32 * 16)
    used = []
    for name in ("conv1x1", "conv3x3"):
        own = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *a, own=own: used.append(own) or own(*a))
    tokenizer = dalle.DalleTokenizer(dalle.build(dalle.WIDE, 1, 512)[0])
    small = torch.randint(0, 256, (18, 8, 4, 3), dtype=torch.uint8)
    pictures = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    for _ in range(2):
        encoder, _ = dalle.build(dalle.WIDE, 1, 512)
        for block in encoder.modules():
            if isinstance(block, dalle.BLOCKS):
                block.res_path.conv_4.w.data.div_(block.post_gain)
        state = {f"encoder.{k}": v.detach().clone() for k, v in encoder.state_dict().items()}
        tokenizer.fill(state)
        assert set(tokenizer.state_dict()) == set(state)
        x = dall_e.map_pixels(pictures.permute(0, 3, 1, 2).float() / 255)
        with torch.no_grad():
            scores = encoder(x)
        assert torch.equal(tokenizer.encode(pictures), scores.argmax(1))
        assert torch.allclose(tokenizer.logits(pictures), scores, atol=1e-4)
        assert len(scores.argmax(1).unique()) > 8
    assert {f.__name__ for f in used} == {"conv1x1", "conv3x3"}
