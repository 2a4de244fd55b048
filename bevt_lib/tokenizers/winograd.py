"""Convolutions of wide frozen networks on a CPU, with fewer products than PyTorch's own.

Source: Lavin and Gray 2016 (arXiv 1509.09308), F(4x4, 3x3): 36 products give 16 outputs, where the
definition takes 144. Rounding errors are 5 to 10 times as large. float32, no gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from bevt_lib.base import onednn

TILES = 196  # of 4x4 outputs in one matrix product: both its sides then stay in the cache

# The paper's B^T, G and A^T for one axis; their Kronecker squares act on tiles of 6x6.
INPUT = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0],
         [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]  # fmt: skip
KERNEL = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # times 24
OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]

_packed = WeakTensorKeyDictionary()  # weight: (its version and place, its matrices)


def is_usable(x: Tensor, weight: Tensor) -> bool:
    """Say whether this can be done: where oneDNN can be used.

    A weight made in inference mode doesn't tell when it changes, so it can't be packed once.
    """
    return onednn.is_usable(x) and not weight.is_inference()


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Do F.conv2d(x, weight, bias) with weights packed once."""
    (matrix,) = cached(weight, lambda w: [w.flatten(1)])
    return onednn.multiply(x.permute(0, 2, 3, 1), matrix, bias).permute(0, 3, 1, 2)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Do F.conv2d(x, weight, bias, padding=1): (N, C, h, w) to (N, K, h, w), channels_last."""
    (n, c, h, w), k = x.shape, len(weight)
    rows, columns = -(-h // 4), -(-w // 4)  # of tiles
    right, below = 4 * columns + 1 - w, 4 * rows + 1 - h
    padded = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, right, 1, below))
    tiles = padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(0, 1, 4, 5, 2, 3)
    matrices = cached(weight, transform_kernel)
    to_input, to_output = (torch.kron(a, a) for a in (x.new_tensor(INPUT), x.new_tensor(OUTPUT)))
    painted = x.new_empty(n, rows, 4, columns, 4, k)
    places = [(i, j) for i in range(n) for j in range(rows)]
    per = max(1, TILES // columns)
    for some in (places[i : i + per] for i in range(0, len(places), per)):
        # A row of tiles at a time, so that the 36 numbers of each stay in the cache.
        inputs = x.new_empty(36, len(some) * columns * c)
        for place, part in zip(some, inputs.split(columns * c, dim=1), strict=True):
            torch.mm(to_input, tiles[place].reshape(36, -1), out=part)
        products = x.new_empty(36, len(some) * columns, k)
        for of, matrix, product in zip(inputs.view(36, -1, c), matrices, products, strict=True):
            product.copy_(onednn.multiply(of, matrix))
        for place, part in zip(some, products.view(36, -1).split(columns * k, dim=1), strict=True):
            outputs = torch.mm(to_output, part).view(4, 4, columns, k).transpose(1, 2)
            torch.add(outputs, bias, out=painted[place])
    return painted.view(n, 4 * rows, 4 * columns, k)[:, :h, :w].permute(0, 3, 1, 2)


def transform_kernel(weight: Tensor) -> list[Tensor]:
    """Give the 36 matrices (K, C) of a kernel (K, C, 3, 3), summed in float64."""
    one = weight.new_tensor(KERNEL, dtype=torch.float64) / 24
    places = weight.permute(2, 3, 0, 1).reshape(9, -1).double()
    return list((torch.kron(one, one) @ places).float().view(36, *weight.shape[:2]))


def cached(weight: Tensor, transform: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    """Transform and pack a weight when first asked, and again when it has changed."""
    state = (weight._version, weight.data_ptr())
    if weight not in _packed or _packed[weight][0] != state:
        matrices = [torch.ops.mkldnn._reorder_linear_weight(m, TILES) for m in transform(weight)]
        _packed[weight] = (state, matrices)
    return _packed[weight][1]
